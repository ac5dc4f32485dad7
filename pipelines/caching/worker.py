"""Workers of stage *cache*: encode one shard of the latent cache, from a range of the listing to its file."""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mar_model.tokenizers import load_tokenizer
from pipelines.caching.latent_format import FORMAT_VERSION, LatentStatistics, shard_bytes, shard_name
from pipelines.caching.records import IMAGE_DIGESTS, finished_record, shard_paths
from pipelines.images.reading import Decoded, decode_row
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.table import ImageRow, ImageRows
from pipelines.runtime import storage
from pipelines.runtime.cluster.channel import MessageChannel
from pipelines.runtime.cluster.precision import autocast
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import default_device, use_threads

AHEAD = 2  # batches of images decoded in advance
SAY_SECONDS = 2.0  # interval of progress messages
CALLS_AT_ONCE = 2  # per encoder: one shard is decoded while another is encoded


@dataclass(frozen=True)
class EncodingJob:
    """Arguments of every encoder."""

    images: ImageSettings
    tokenizer: str
    path: str
    batch: int
    dtype: str
    precision: str
    decoders: int  # threads
    cluster: ClusterSettings


@dataclass(frozen=True)
class ShardProgress:
    """Message from an encoder to the driver: number of encoded images of a shard."""

    shard: int
    images: int


@dataclass
class Seconds:
    """Timings of the encoders, by step."""

    decoding: float = 0.0  # waiting for images
    encoding: float = 0.0
    writing: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.decoding + other.decoding, self.encoding + other.encoding, self.writing + other.writing)

    def shares(self) -> dict[str, float]:
        """Share of each step in the total time."""
        total = self.decoding + self.encoding + self.writing
        return {name: seconds / total if total else 0.0 for name, seconds in vars(self).items()}


@dataclass
class _Shard:
    """A shard in progress."""

    reasons: list[str]
    digests: list[str]
    usable: list[int] = field(default_factory=list)
    moments: list[np.ndarray] = field(default_factory=list)  # (2, n, 2C, h, w) per batch: images, mirror images
    deviation: dict[str, float] | None = None


class Encoder:
    """A tokenizer on a device that encodes uint8 images to moments in the given precision."""

    def __init__(self, tokenizer: str, precision: str, dtype: str, device: torch.device) -> None:
        self.precision, self.dtype, self.device = precision, dtype, device
        self.tokenizer = load_tokenizer(storage.local_directory(tokenizer)).to(device)
        self.tokenizer.to(memory_format=torch.channels_last)

    def buffer(self, batch: int, size: int) -> torch.Tensor:
        """A buffer for a batch of images, uint8 (batch, size, size, 3), in pinned memory for a GPU."""
        return torch.empty(batch, size, size, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, S, S, 3) → float32 (2, n, 2C, h, w) on the device: moments of the images and of their mirror images."""
        pixels = self._pixels(images)
        _float32_products(tf32=self.precision == "tf32")
        with autocast("bf16" if self.precision == "bf16" else "float32", self.device):
            return torch.stack([self.tokenizer.moments(view).float() for view in (pixels, pixels.flip(-1))])

    @torch.inference_mode()
    def deviation(self, images: torch.Tensor, moments: torch.Tensor) -> dict[str, float]:
        """Deviation of `moments`, of these images (n, S, S, 3) and their mirror images, from float32 with contiguous tensors: root mean
        square and maximum, of the posterior means in units of their standard deviation, and of the log-variances."""
        _float32_products(tf32=False)
        pixels = self._pixels(images).contiguous()
        self.tokenizer.to(memory_format=torch.contiguous_format)
        exact = torch.stack([self.tokenizer.moments(view).float() for view in (pixels, pixels.flip(-1).contiguous())])
        self.tokenizer.to(memory_format=torch.channels_last)
        difference = (moments.double() - exact.double()).abs()
        means, log_variances = difference.chunk(2, dim=2)
        scale = max(exact.double().chunk(2, dim=2)[0].std(unbiased=False).item(), 1e-12)
        return {
            "images": float(len(images)),
            "means_rms": means.square().mean().sqrt().item() / scale,
            "means_max": means.max().item() / scale,
            "log_variances_rms": log_variances.square().mean().sqrt().item(),
            "log_variances_max": log_variances.max().item(),
        }

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Float (n, 3, S, S) in [-1, 1] on the device, channels last."""
        return images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _float32_products(tf32: bool) -> None:
    """Whether the GPU may round the factors of float32 products to TF32 (10 bits of mantissa)."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]


class ShardEncoder:
    """Makes shards, as an actor of Ray Data with two concurrent calls: while one shard is encoded, the images of the next are decoded and
    the previous shard is written."""

    def __init__(self, job: EncodingJob, rows: Any, channel: MessageChannel | None = None) -> None:
        """`rows`: ImageRows, or a reference to them. Progress messages are sent to `channel`."""
        import ray

        use_threads(job.cluster)
        self.job, self.channel = job, channel
        self.rows: ImageRows = ray.get(rows) if isinstance(rows, ray.ObjectRef) else rows
        self.encoder = Encoder(job.tokenizer, job.precision, job.dtype, default_device())
        self.threads = ThreadPoolExecutor(job.decoders, thread_name_prefix="decode")
        self.buffers = [self.encoder.buffer(job.batch, job.images.size) for _ in range(2)]  # double buffering
        self.encoding = threading.Lock()
        self.last_message = time.monotonic()

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns `index`, `start`, `stop` of shards → `index`, `record` (JSON) and `seconds` (decoding, encoding, writing)."""
        shards = [self.make(int(index), int(start), int(stop)) for index, start, stop in zip(*block.values(), strict=True)]
        seconds = np.array([[took.decoding, took.encoding, took.writing] for _, took in shards])
        return {"index": block["index"], "record": np.array([json.dumps(record) for record, _ in shards], object), "seconds": seconds}

    def _say(self, index: int, images: int) -> None:
        if self.channel is not None and time.monotonic() - self.last_message > SAY_SECONDS:
            self.last_message = time.monotonic()
            self.channel.send(ShardProgress(index, images))

    def make(self, index: int, start: int, stop: int) -> tuple[dict[str, Any], Seconds]:
        """Make shard `index` of rows start … stop − 1: write its file and its record. Returns the record and the timings."""
        finished = finished_record(self.job.images, self.job.path, self.rows, index, start)
        if finished is not None:  # made by an encoder that was killed before it returned
            return finished, Seconds()
        rows = self.rows[start:stop]
        shard, seconds = _Shard([""] * len(rows), [""] * len(rows)), Seconds()
        images = iter(rows)
        ahead: deque[Future[Decoded]] = deque()
        for _ in range(AHEAD * self.job.batch):
            self._submit(images, ahead)
        try:
            with self.encoding:
                self._encode(index, shard, images, ahead, seconds)
            began = time.perf_counter()
            record = self._write(index, rows, shard)
            seconds.writing = time.perf_counter() - began
        finally:
            for future in ahead:
                future.cancel()
        return record, seconds

    def _submit(self, images: Iterator[ImageRow], ahead: deque[Future[Decoded]]) -> None:
        row = next(images, None)
        if row is not None:
            ahead.append(self.threads.submit(decode_row, self.job.images, row))

    def _encode(self, index: int, shard: _Shard, images: Iterator[ImageRow], ahead: deque[Future[Decoded]], seconds: Seconds) -> None:
        """Encode all images into `shard`, batch by batch. Every batch but the last is full, also after rejected images."""
        place = batches = 0
        launched = deque[torch.Tensor]()  # a GPU computes the previous batch while this one is filled
        while ahead:
            began = time.perf_counter()
            buffer, count = self.buffers[batches % 2], 0
            while ahead and count < self.job.batch:
                decoded = ahead.popleft().result()
                self._submit(images, ahead)
                shard.reasons[place], shard.digests[place] = decoded.reason, decoded.digest
                if decoded.pixels is not None:
                    buffer[count] = torch.from_numpy(decoded.pixels)
                    shard.usable.append(place)
                    count += 1
                place += 1
            filled = time.perf_counter()
            if count:
                moments = self.encoder.encode(buffer[:count])
                if index == 0 and batches == 0:
                    shard.deviation = self.encoder.deviation(buffer[:count], moments)
                batches += 1
                launched.append(moments)
                if len(launched) > 1 or self.encoder.device.type == "cpu":
                    shard.moments.append(self._fetched(launched.popleft()))
            seconds.decoding += filled - began
            seconds.encoding += time.perf_counter() - filled
            self._say(index, place)
        shard.moments += [self._fetched(moments) for moments in launched]

    def _fetched(self, moments: torch.Tensor) -> np.ndarray:
        with np.errstate(over="ignore"):
            return moments.cpu().numpy().astype(self.job.dtype)

    def _write(self, index: int, rows: ImageRows, shard: _Shard) -> dict[str, Any]:
        keys, labels = rows.column("key"), rows.column("label")
        if shard.moments:
            moments, flipped = np.concatenate(shard.moments, axis=1)
        else:
            side = self.job.images.size // self.encoder.tokenizer.stride
            moments = flipped = np.empty((0, 2 * self.encoder.tokenizer.channels, side, side), self.job.dtype)
        finite = np.isfinite(moments).all(axis=(1, 2, 3)) & np.isfinite(flipped).all(axis=(1, 2, 3))
        usable = np.array(shard.usable, np.int64)
        for place in usable[~finite]:
            shard.reasons[place] = f"the tokenizer's moments are not finite in {self.job.dtype}"
        usable, moments, flipped = usable[finite], moments[finite], flipped[finite]
        data = shard_bytes([keys[row] for row in usable], labels[usable].tolist(), moments, flipped)
        statistics = LatentStatistics.of(moments).merged(LatentStatistics.of(flipped)) if len(usable) else None
        record = {
            "format_version": FORMAT_VERSION,
            "name": shard_name(index),
            "rows": len(usable),
            "sha256": storage.digest(data),
            "bytes": len(data),
            "statistics": vars(statistics) if statistics else None,
            "deviation": shard.deviation,
            "rejected": [
                {"row": place, "key": key, "reason": reason, "sha256": digest}
                for place, (key, reason, digest) in enumerate(zip(keys, shard.reasons, shard.digests, strict=True))
                if reason
            ],
        }
        path, record_path = shard_paths(self.job.path, index)
        storage.write_bytes(path, data)
        storage.write_json(record_path, {**record, IMAGE_DIGESTS: shard.digests})  # last: a shard without a record is made again
        return record
