"""Sets of images to compute statistics of: real images, decoded latents, noise, samples."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mar_model.noise import stream
from mar_model.tokenizers import Tokenizer, load_tokenizer
from pipelines.caching.latent_cache import LatentCache
from pipelines.evaluation.image_sets.blocks import Block
from pipelines.generation import samples
from pipelines.images.pixels import to_model, to_uint8
from pipelines.images.reading import decode_row
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.table import ImageRow
from pipelines.runtime import storage
from pipelines.tokenizing.directory import tokenizer_digest

if TYPE_CHECKING:
    from ray.data import Dataset


class ImageSource(Protocol):
    """Images at the places 0 … len − 1, read by tasks."""

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """What the pixels depend on."""

    def block(self, start: int, stop: int) -> Block:
        """The images at these places; those that can't be used are left out."""


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

    def block(self, start: int, stop: int) -> Block:
        found, index, labels = [], [], []
        for place, row in enumerate(self.rows[start:stop], start):
            pixels = decode_row(self.images, row).pixels
            if pixels is not None:  # the stage cache names the others; statistics have their count
                found.append(pixels)
                index.append(place)
                labels.append(row.label)
        images = np.stack(found) if found else np.empty((0, self.images.size, self.images.size, 3), np.uint8)
        return Block(images, np.array(index, np.int64), np.array(labels, np.int64))

    def read(self, start: int, stop: int) -> np.ndarray:
        """The images of `block`."""
        return self.block(start, stop).images


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
    def block(self, start: int, stop: int) -> Block:
        moments, _ = self._cache.take(np.arange(start, stop), np.zeros(stop - start, bool))
        means = torch.from_numpy(moments.astype(np.float32)).chunk(2, dim=1)[0]
        return _numbered(to_uint8(_decoder(self.tokenizer).decode(means)), start)

    @cached_property
    def _cache(self) -> LatentCache:
        return LatentCache(self.path)


@lru_cache(maxsize=1)
def _decoder(path: str) -> Tokenizer:
    """The tokenizer in `path`, loaded once in each worker process."""
    return load_tokenizer(storage.local_directory(path))


@dataclass(frozen=True)
class ReconstructedImages:
    """Rows of an image source, cropped, encoded by a tokenizer (the means of the posterior) and decoded again."""

    images: ImageSettings
    rows: Sequence[ImageRow]
    tokenizer: str

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> dict[str, Any]:
        real = RealImages(self.images, self.rows)
        return {**real.identity(), "kind": "reconstructions", "versions": real.versions(), "tokenizer": tokenizer_digest(self.tokenizer)}

    @torch.inference_mode()
    def block(self, start: int, stop: int) -> Block:
        real = RealImages(self.images, self.rows).block(start, stop)
        if not len(real.index):
            return real
        tokenizer = _decoder(self.tokenizer)
        means = tokenizer.moments(to_model(real.images)).chunk(2, dim=1)[0]
        return Block(to_uint8(tokenizer.decode(means)), real.index, real.labels)


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

    def block(self, start: int, stop: int) -> Block:
        return _numbered(self.read(start, stop), start)

    def read(self, start: int, stop: int) -> np.ndarray:
        """uint8 (stop − start, size, size, 3)."""
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

    def block(self, start: int, stop: int) -> Block:
        images, labels = [], []
        for first, last in samples.shards_there(self.path):
            if first < stop and start < last:
                shard, rows = samples.read_samples(self.path, first, last), slice(max(0, start - first), stop - first)
                images.append(shard.images[rows])
                labels.append(shard.labels[rows])
        return Block(np.concatenate(images), np.arange(start, start + sum(map(len, labels))), np.concatenate(labels))


def _numbered(images: np.ndarray, start: int) -> Block:
    return Block(images, np.arange(start, start + len(images)), np.full(len(images), -1))


def read_sources(sources: Sequence[ImageSource], batch: int, done: Sequence[Collection[tuple[int, int]]]) -> "Dataset":
    """A Ray dataset of the sources' images one after the other, a block for each `batch`, without the blocks (start, stop) of each source
    that are done. Columns: `source` (its number), `start`, `stop` (the block's places), `index`, `label`, `image`."""
    import ray.data

    rows = [
        {"source": number, "start": start, "stop": stop}
        for number, source in enumerate(sources)
        for start, stop in ranges(len(source), batch)
        if (start, stop) not in done[number]
    ]

    def read(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        number, start, stop = (int(block[name][0]) for name in ("source", "start", "stop"))
        found = sources[number].block(start, stop)
        place = {name: np.full(len(found.index), value) for name, value in (("source", number), ("start", start), ("stop", stop))}
        return {**place, "index": found.index, "label": found.labels, "image": found.images}

    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))
    dataset.context.execution_options.preserve_order = True
    return dataset.map_batches(read, batch_size=1)


def ranges(count: int, batch: int) -> list[tuple[int, int]]:
    """The blocks that `count` images are read in."""
    return [(start, min(start + batch, count)) for start in range(0, count, batch)]
