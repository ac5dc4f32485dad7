"""One shard of the latent cache, from the names of its images to its file: the work of stage *cache* on the workers."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from mar_model.tokenizers import load_tokenizer
from pipelines import storage
from pipelines.cluster import ClusterSettings, default_device, use_threads
from pipelines.images import ImageError, ImageRow, ImageSettings, decode, read_image, to_model
from pipelines.latents import FORMAT_VERSION, SHARDS, LatentStatistics, shard_bytes, shard_name
from pipelines.precision import autocast

READS_AT_ONCE = 8  # an object store answers one read after tens of milliseconds, and many in the same time


def shard_paths(path: str, index: int) -> tuple[str, str]:
    """The shard, and its record: rows, checksum, statistics, rejects."""
    shard = storage.join(path, SHARDS, shard_name(index))
    return shard, shard.removesuffix(".arrow") + ".json"


def decode_shard(images: ImageSettings, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Read, decode and crop the images of one shard: adds `image` uint8 (n, size, size, 3), black where it can't be used, and
    `reason` (empty: usable) and `sha256` of the bytes."""
    pixels = np.zeros((len(batch["key"]), images.size, images.size, 3), np.uint8)
    reasons, digests = [], []
    rows = [ImageRow(str(key), int(label), held_out=False) for key, label in zip(batch["key"], batch["label"], strict=True)]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        for position, (data, digest) in enumerate(pool.map(partial(read, images), rows)):
            reason = ""
            try:
                if data is None:
                    raise ImageError("the file can't be read")
                pixels[position] = decode(data, images.size)
            except ImageError as error:
                reason = str(error)
            reasons.append(reason)
            digests.append(digest)
    return {**batch, "image": pixels, "reason": np.array(reasons), "sha256": np.array(digests)}


def read(images: ImageSettings, row: ImageRow) -> tuple[bytes | None, str]:
    """Bytes of one image and their SHA-256, or (None, "") where they can't be read."""
    try:
        data = read_image(images, row)
    except OSError:
        return None, ""
    return data, storage.digest(data)


class ShardEncoder:
    """An actor that holds the tokenizer; a call turns the decoded images of one shard into its file and its record."""

    def __init__(self, tokenizer_path: str, path: str, batch: int, dtype: str, precision: str, cluster: ClusterSettings) -> None:
        use_threads(cluster)
        self.path, self.batch, self.dtype, self.precision = path, batch, dtype, precision
        self.device = default_device()
        self.tokenizer = load_tokenizer(storage.local_directory(tokenizer_path)).to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        index = int(batch["shard"][0])
        if not (batch["shard"] == index).all():
            raise RuntimeError(f"a block of shards {sorted(set(batch['shard'].tolist()))}, expected one shard a block")
        reasons = batch["reason"].astype(object)
        usable = np.flatnonzero(reasons == "")
        moments, flipped = self.encode(batch["image"], usable)
        finite = np.isfinite(moments).all(axis=(1, 2, 3)) & np.isfinite(flipped).all(axis=(1, 2, 3))
        reasons[usable[~finite]] = f"the tokenizer's moments are not finite in {self.dtype}"
        usable, moments, flipped = usable[finite], moments[finite], flipped[finite]
        keys, digests = batch["key"].tolist(), batch["sha256"].tolist()
        data = shard_bytes([keys[one] for one in usable], batch["label"][usable].tolist(), moments, flipped)
        statistics = LatentStatistics.of(moments).merged(LatentStatistics.of(flipped)) if len(usable) else None
        record = {
            "format_version": FORMAT_VERSION,
            "name": shard_name(index),
            "rows": len(usable),
            "sha256": storage.digest(data),
            "bytes": len(data),
            "statistics": vars(statistics) if statistics else None,
            "rejected": [
                {"key": key, "reason": str(reason), "sha256": digest}
                for key, reason, digest in zip(keys, reasons, digests, strict=True)
                if reason
            ],
        }
        shard, record_path = shard_paths(self.path, index)
        storage.write_bytes(shard, data)
        storage.write_json(record_path, record)  # last: a shard without its record is made again
        return {"shard": [index], "record": [json.dumps(record)]}

    @torch.inference_mode()
    def encode(self, images: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moments of the usable ones of uint8 images (n, S, S, 3), and of their mirror images: each (usable, 2C, h, w)."""
        side = images.shape[1] // self.tokenizer.stride
        moments = np.empty((2, len(usable), 2 * self.tokenizer.channels, side, side), self.dtype)
        for start in range(0, len(usable), self.batch):
            part = slice(start, start + self.batch)
            pixels = to_model(images[usable[part]]).to(self.device)
            for mirrored, view in enumerate((pixels, pixels.flip(-1))):
                with autocast(self.precision, self.device), np.errstate(over="ignore"):
                    moments[mirrored, part] = self.tokenizer.encode(view).float().cpu().numpy()
        return moments[0], moments[1]
