"""Sets of images to compute statistics of: real images, decoded latents, noise, samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mar_model.noise import stream
from mar_model.tokenizers import Tokenizer, load_tokenizer
from pipelines.caching.latent_cache import LatentCache
from pipelines.generation import samples
from pipelines.images.pixels import to_uint8
from pipelines.images.reading import decode_row
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.table import ImageRow
from pipelines.runtime import storage

if TYPE_CHECKING:
    from ray.data import Dataset


class ImageSource(Protocol):
    """Images 0 … len − 1, read by tasks."""

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """What the pixels depend on."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """uint8 (≤ stop − start, H, W, 3); images that can't be used are left out."""


@dataclass(frozen=True)
class RealImages:
    """Rows of an image source, cropped."""

    images: ImageSettings
    rows: Sequence[ImageRow]

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> dict[str, Any]:
        """By keys and sizes in bytes, wherever the images lie."""
        keys = storage.digest("\n".join(f"{row.key} {row.size}" for row in self.rows).encode())
        return {"kind": "images", "size": self.images.size, "exif": self.images.exif, "keys": keys}

    def versions(self) -> str:
        """A digest of the times at which the images' files were written."""
        return storage.digest(np.array([row.version for row in self.rows], "<i8").tobytes())

    def read(self, start: int, stop: int) -> np.ndarray:
        decoded = [decode_row(self.images, row).pixels for row in self.rows[start:stop]]
        found = [pixels for pixels in decoded if pixels is not None]  # stage *cache* names the others; statistics have their count
        return np.stack(found) if found else np.empty((0, self.images.size, self.images.size, 3), np.uint8)


@dataclass(frozen=True)
class CachedLatents:
    """The posterior means of a latent cache (no mirror images), decoded with the cache's own tokenizer."""

    path: str
    tokenizer: str

    def __len__(self) -> int:
        return len(self._cache)

    def identity(self) -> dict[str, Any]:
        return {"kind": "latents", "cache": self._cache.digest, "tokenizer": self._cache.manifest.tokenizer["digest"]}

    @torch.inference_mode()
    def read(self, start: int, stop: int) -> np.ndarray:
        moments, _ = self._cache.take(np.arange(start, stop), np.zeros(stop - start, bool))
        means = torch.from_numpy(moments.astype(np.float32)).chunk(2, dim=1)[0]
        return to_uint8(_decoder(self.tokenizer).decode(means))

    @cached_property
    def _cache(self) -> LatentCache:
        return LatentCache(self.path)


@lru_cache(maxsize=1)
def _decoder(path: str) -> Tokenizer:
    """The tokenizer in `path`, loaded once in each worker process."""
    return load_tokenizer(storage.local_directory(path))


@dataclass(frozen=True)
class NoiseImages:
    """Uniform random pixels: how far away images without any content are."""

    count: int
    size: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        return {"kind": "noise", "count": self.count, "size": self.size, "seed": self.seed}

    def read(self, start: int, stop: int) -> np.ndarray:
        shape = (self.size, self.size, 3)
        draws = [torch.randint(0, 256, shape, generator=stream(self.seed, "noise images", index)) for index in range(start, stop)]
        return torch.stack(draws).to(torch.uint8).numpy()


@dataclass(frozen=True)
class DrawnSamples:
    """The first `count` samples of an evaluation, from its shards."""

    path: str
    count: int
    drawing: dict[str, Any]  # the evaluation's identity

    def __len__(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        return {"kind": "samples", "count": self.count, "drawing": self.drawing}

    def read(self, start: int, stop: int) -> np.ndarray:
        parts = [
            samples.read_samples(self.path, first, last).images[max(0, start - first) : stop - first]
            for first, last in samples.shards_there(self.path)
            if first < stop and start < last
        ]
        return np.concatenate(parts)


def read_sources(sources: list[ImageSource], batch: int) -> "Dataset":
    """A Ray dataset of the sources' images one after the other, a block for each `batch`: columns `source` (its number), `image`."""
    import ray.data

    rows = [
        {"source": number, "start": start, "stop": min(start + batch, len(source))}
        for number, source in enumerate(sources)
        for start in range(0, len(source), batch)
    ]

    def read(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = int(block["source"][0])
        images = sources[number].read(int(block["start"][0]), int(block["stop"][0]))
        return {"source": np.full(len(images), number), "image": images}

    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.execution_options.preserve_order = True
    return dataset.map_batches(read, batch_size=1)
