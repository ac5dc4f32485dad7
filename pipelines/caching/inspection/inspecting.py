"""Summary of a latent cache for the user: counts, classes, latents, rejected images, and some images decoded."""

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

SAMPLED = 2048  # images in the histogram, evenly spaced over the cache
WALL = 64  # images to decode
EDGES = np.linspace(-5.0, 5.0, 41)  # of the histogram bins, in standard deviations


@dataclass(frozen=True)
class Inspection:
    """`images`: count per class. `histogram`: share of the normalised posterior means in each bin of EDGES; the outermost bins are
    open-ended. `rejected`: count per reason."""

    cache: LatentCache
    images: np.ndarray
    histogram: np.ndarray
    sampled: int
    rejected: Counter[str]


def inspect(path: str) -> Inspection:
    """Summarise the cache at `path`. Raises UserError if there is none, or if shards are missing."""
    cache = LatentCache(path)
    manifest = cache.manifest
    rows = spread(len(cache), SAMPLED)
    moments, _ = cache.take(rows, np.zeros(len(rows), bool))
    mean, std = (np.array(values)[:, None, None] for values in (manifest.latent_mean, manifest.latent_std))
    latents = (np.split(moments.astype(np.float64), 2, axis=1)[0] - mean) / std
    counts = np.histogram(latents.clip(EDGES[0], EDGES[-1]), EDGES)[0]
    return Inspection(
        cache,
        np.bincount(cache.labels(), minlength=len(manifest.class_names)),
        counts / max(counts.sum(), 1),
        len(rows),
        Counter(image["reason"].partition(":")[0] for image in read_rejected(path)),
    )


@torch.inference_mode()
def write_wall(cache: LatentCache, tokenizer: str, path: str) -> int:
    """Decode images evenly spaced over the cache with the tokenizer in directory `tokenizer`, and write them as a grid in a PNG file;
    returns their number. Raises UserError if the cache was made with another tokenizer."""
    require_tokenizer(tokenizer, cache.manifest.tokenizer["digest"], f"cache {cache.path!r}")
    rows = spread(len(cache), WALL)
    moments, labels = cache.take(rows, np.zeros(len(rows), bool))
    decoder = load_tokenizer(storage.local_directory(tokenizer))
    means = torch.from_numpy(moments.astype(np.float32)).chunk(2, dim=1)[0]
    images = np.concatenate([to_uint8(decoder.decode(part)) for part in means.split(8)])
    write_grid(path, images, labels)
    return len(rows)


def spread(rows: int, count: int) -> np.ndarray:
    """`count` evenly spaced indices below `rows`; all if there are fewer."""
    return np.unique(np.linspace(0, rows - 1, min(rows, count)).astype(np.int64))
