"""Verifies that a latent cache matches its manifest: every checksum and, on request, a sample of images encoded again."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.caching.inspection.inspecting import spread
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import MANIFEST, SHARDS, Manifest
from pipelines.caching.records import REJECTED, read_record, read_rejected
from pipelines.caching.worker import Encoder
from pipelines.images.listing import kept_listing
from pipelines.images.reading import decode_row
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import LISTING
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.records import damaged
from pipelines.runtime.stage import CONFIGURATION, IDENTITY, SUMMARY, read_summary
from pipelines.tokenizing.directory import require_tokenizer

CHECKS_AT_ONCE = 4
# Largest difference of a posterior mean encoded again in a batch of another size, in standard deviations of the latents
TOLERANCE = {"float32": 0.01, "tf32": 0.05, "bf16": 0.5}


@dataclass(frozen=True)
class Sampled:
    """Images encoded again: their number, and the largest difference of a posterior mean in standard deviations of the latents; key and
    difference of each image where it exceeds `allowed`, in descending order."""

    images: int
    largest: float
    allowed: float
    differing: list[tuple[str, float]]


def damages(cache: LatentCache) -> Iterator[tuple[str, str]]:
    """Name and error of each shard that does not match the manifest in length, checksum, schema or number of rows."""
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        found = pool.map(lambda entry: (entry["name"], _damage(cache, entry)), cache.manifest.shards)
        yield from ((name, text) for name, text in found if text)
    rows = sum(entry["rows"] for entry in cache.manifest.shards)
    if rows != len(cache):
        yield MANIFEST, f"the manifest has {len(cache):,} rows, but its shards have {rows:,}"


def damaged_records(path: str) -> Iterator[str]:
    """Errors in the other existing files of the cache at `path`, which training does not read."""
    listing = storage.join(path, LISTING)
    again = "run `mar cache` with the cache's settings to write the file again"
    if storage.exists(listing) and kept_listing(listing) is None:
        yield str(damaged(listing, "it is not a listing of images", again))
    readers: dict[str, Callable[[], object]] = {
        REJECTED: lambda: read_rejected(path),
        SUMMARY: lambda: read_summary(path, again),
        **{name: partial(storage.read_json, storage.join(path, name), dict[str, Any], again) for name in (IDENTITY, CONFIGURATION)},
    }
    for name, read in readers.items():
        try:
            if storage.exists(storage.join(path, name)):
                read()
        except DamagedFileError as error:
            yield str(error)


def _damage(cache: LatentCache, entry: dict[str, Any]) -> str:
    path = storage.join(cache.path, SHARDS, entry["name"])
    if not storage.exists(path):
        return f"{entry['name']} is missing"
    data = storage.read_bytes(path)
    if len(data) != entry["bytes"]:
        return f"{entry['name']} has {len(data):,} bytes, expected {entry['bytes']:,} as in the manifest"
    if storage.digest(data) != entry["sha256"]:
        return f"{entry['name']} does not have the SHA-256 in the manifest"
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    shape = json.loads(table.schema.metadata[b"moments_shape"])
    record = storage.join(cache.path, SHARDS, entry["name"].removesuffix(".arrow") + ".json")
    if storage.exists(record) and read_record(record) is None:
        return f"{record} is damaged: it is not the record of a shard"
    if table.num_rows != entry["rows"] or tuple(shape) != cache.moments_shape:
        return f"{entry['name']} has {table.num_rows} rows of {shape}, expected {entry['rows']} of {list(cache.moments_shape)}"
    return ""


def encode_again(cache: LatentCache, images: ImageSettings, tokenizer: str, count: int, device: torch.device) -> Sampled:
    """Read `count` images evenly spaced over the cache from their source, encode them again and compare the moments.

    Raises UserError if the source or the tokenizer has changed, or if an image can no longer be used.
    """
    require_tokenizer(tokenizer, cache.manifest.tokenizer["digest"], f"cache {cache.path!r}")
    manifest = cache.manifest
    rows = spread(len(cache), count)
    listing = kept_listing(storage.join(cache.path, LISTING))
    if listing is None:
        file = storage.join(cache.path, LISTING)
        raise UserError(
            f"{file}, which contains the places of the images, is missing or damaged",
            remedy="run `mar cache` with the cache's settings again",
        )
    keys = listing.rows.column("key")
    places = {key: place for place, key in reversed(list(enumerate(keys)))}  # of duplicate keys the first is used
    pixels = []
    sampled = cache.keys(rows)
    for key in sampled:
        decoded = decode_row(images, listing.rows[places[key]])
        if decoded.pixels is None:
            raise UserError(f"image {key} of {images.source!r} can no longer be used: {decoded.reason}; the source has changed")
        pixels.append(torch.from_numpy(decoded.pixels))
    precision = manifest.precision.get("name", "float32")
    encoder = Encoder(tokenizer, precision, manifest.dtype, device)
    found = torch.cat([encoder.encode(torch.stack(pixels[start : start + 8])) for start in range(0, len(rows), 8)], dim=1).cpu().numpy()
    std = np.array(manifest.latent_std)[:, None, None]
    apart = np.zeros(len(rows))
    for mirrored in (False, True):
        cached = cache.take(rows, np.full(len(rows), mirrored))[0]
        expected = found[int(mirrored)].astype(manifest.dtype)
        difference = np.abs(cached.astype(np.float64) - expected.astype(np.float64))[:, : manifest.latent_channels] / std
        apart = np.maximum(apart, difference.max(axis=(1, 2, 3)))
    allowed = TOLERANCE[precision] + _rounding(manifest)
    order = np.argsort(-apart, kind="stable").tolist()
    differing = [(sampled[index], float(apart[index])) for index in order if not apart[index] <= allowed]
    return Sampled(len(rows), float(apart.max()), allowed, differing)


def _rounding(manifest: Manifest) -> float:
    """Distance of adjacent numbers of the cache's dtype at the largest latent, in standard deviations."""
    largest = np.maximum(np.abs(manifest.latent_min), np.abs(manifest.latent_max))
    spacing = np.spacing(largest.astype(manifest.dtype)).astype(np.float64)
    return float((spacing / np.array(manifest.latent_std)).max())
