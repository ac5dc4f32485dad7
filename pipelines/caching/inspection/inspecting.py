"""What is in a latent cache, for a person: counts, classes, latents, rejects, and some of its images decoded again."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from mar_model.tokenizers import load_tokenizer
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.records import read_rejected
from pipelines.images.grid import write_grid
from pipelines.images.pixels import to_uint8
from pipelines.runtime import storage
from pipelines.tokenizing.directory import require_tokenizer

SAMPLED = 2048  # records that the histogram is made of, spread evenly over the cache
WALL = 64  # images decoded
EDGES = np.linspace(-5.0, 5.0, 41)  # of the histogram, in standard deviations


@dataclass(frozen=True)
class Inspection:
    """`images`: of each class. `histogram`: share of the normalised posterior means in each bin of EDGES, the outermost open-ended.
    `rejected`: images by reason."""

    cache: LatentCache
    images: np.ndarray
    histogram: np.ndarray
    sampled: int
    rejected: Counter[str]


def inspect(path: str) -> Inspection:
    """Look into the cache at `path`. Raises UserError where there is none, or where shards are missing."""
    cache = LatentCache(path)
    manifest = cache.manifest
    rows = spread(len(cache), SAMPLED)
    moments, _ = cache.take(rows, np.zeros(len(rows), bool))
    mean, std = (np.array(one)[:, None, None] for one in (manifest.latent_mean, manifest.latent_std))
    latents = (np.split(moments.astype(np.float64), 2, axis=1)[0] - mean) / std
    counts = np.histogram(latents.clip(EDGES[0], EDGES[-1]), EDGES)[0]
    return Inspection(
        cache,
        np.bincount(cache.labels(), minlength=len(manifest.class_names)),
        counts / max(counts.sum(), 1),
        len(rows),
        Counter(one["reason"].partition(":")[0] for one in read_rejected(path)),
    )


@torch.inference_mode()
def write_wall(cache: LatentCache, tokenizer: str, path: str) -> int:
    """Decode images spread over the cache with the tokenizer in directory `tokenizer`, and write them side by side as a PNG; returns
    how many. Raises UserError when it is another tokenizer than the cache's."""
    require_tokenizer(tokenizer, cache.manifest.tokenizer["digest"], f"cache {cache.path!r}")
    rows = spread(len(cache), WALL)
    moments, labels = cache.take(rows, np.zeros(len(rows), bool))
    decoder = load_tokenizer(storage.local_directory(tokenizer))
    means = torch.from_numpy(moments.astype(np.float32)).chunk(2, dim=1)[0]
    images = np.concatenate([to_uint8(decoder.decode(part)) for part in means.split(8)])
    write_grid(path, images, labels)
    return len(rows)


def spread(rows: int, count: int) -> np.ndarray:
    """`count` of so many rows (all where there are fewer), evenly spaced."""
    return np.unique(np.linspace(0, rows - 1, min(rows, count)).astype(np.int64))
