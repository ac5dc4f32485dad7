"""Readers of given samples: the pixels of an image by its number, as they are, without a crop."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipelines.evaluation import npz
from pipelines.evaluation.image_sets.blocks import Block
from pipelines.generation import samples
from pipelines.images.pixels import to_rgb
from pipelines.images.reading import read_image
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.table import ImageRows
from pipelines.runtime.errors import ImageError, UserError

NPZ_REMEDY = "expected arr_0 of uint8 (N, H, W, 3), as numpy.savez writes it and ADM's suite reads it"


class Reader(Protocol):
    """Images 0 … N − 1."""

    def take(self, index: np.ndarray) -> np.ndarray:
        """Pixels of these images, uint8 (n, H, W, 3), in their order. Raises UserError for one that can't be used."""


@dataclass(frozen=True)
class GivenSamples:
    """An image source of given samples, read in the order `order`: random, so that each contiguous block of places is a fair part of all,
    with every class in equal numbers. `about`: what the pixels depend on."""

    reader: Reader
    labels: np.ndarray  # (N,) int64: −1 where unknown
    order: np.ndarray  # (N,) int64: the number of the image at each place
    shape: tuple[int, int]  # height and width
    about: dict[str, Any]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.order)

    def identity(self) -> dict[str, Any]:
        return self.about

    def block(self, start: int, stop: int) -> Block:
        index = self.order[start:stop]
        return Block(self.reader.take(index), index, self.labels[index])

    def in_order(self) -> "GivenSamples":
        """The same, read one after the other."""
        return replace(self, order=np.arange(len(self.order)))


@dataclass(frozen=True)
class ListedReader:
    """Encoded images of a source, all of the shape (height, width)."""

    settings: ImageSettings
    rows: ImageRows
    shape: tuple[int, int]

    def take(self, index: np.ndarray) -> np.ndarray:
        return np.stack([self._pixels(int(number)) for number in index])

    def _pixels(self, number: int) -> np.ndarray:
        row = self.rows[number]
        pixels = decode_as_it_is(self.settings, self.rows[number])
        if pixels.shape[:2] != self.shape:
            first = self.rows[0].key
            raise UserError(
                f"evaluate.samples {self.settings.source!r} holds images of different sizes: {row.key} is {_size(pixels.shape)}, "
                f"{first} is {_size(self.shape)}, expected one size",
                remedy="resize or crop them all alike",
            )
        return pixels


def decode_as_it_is(settings: ImageSettings, row: Any) -> np.ndarray:
    """uint8 (H, W, 3) of one image. Raises UserError where it can't be read or decoded: a sample is never left out."""
    try:
        with Image.open(io.BytesIO(read_image(settings, row))) as image:
            return np.asarray(to_rgb(image, False))
    except Exception as error:  # a decoder meets arbitrary bytes
        if isinstance(error, UserError):
            raise
        reason = str(error).split(" <_io.BytesIO")[0] if isinstance(error, ImageError | OSError) else type(error).__name__
        raise UserError(
            f"evaluate.samples {settings.source!r}: {row.key} can't be used: {reason}", remedy="replace or remove it"
        ) from error


@dataclass(frozen=True)
class NpzReader:
    """`arr_0` of an `.npz`, read in pieces."""

    member: npz.Member

    @cached_property
    def _rows(self) -> npz.Rows:
        return _rows_of(self.member)

    def take(self, index: np.ndarray) -> np.ndarray:
        if len(index) and (np.diff(index) == 1).all():
            return self._rows.read(int(index[0]), int(index[-1]) + 1)
        return np.concatenate([self._rows.read(int(number), int(number) + 1) for number in index])

    def __getstate__(self) -> dict[str, Any]:
        return {"member": self.member}  # without an open file


@lru_cache(maxsize=2)
def _rows_of(member: npz.Member) -> npz.Rows:
    """One in each process: a compressed file is read on from where it stands."""
    return npz.Rows(member, NPZ_REMEDY)


@dataclass(frozen=True)
class ShardReader:
    """Samples that `mar generate` or `mar evaluate` drew."""

    path: str
    ranges: Sequence[tuple[int, int]]

    def take(self, index: np.ndarray) -> np.ndarray:
        stops = np.array([stop for _, stop in self.ranges])
        found: np.ndarray | None = None
        numbers = np.searchsorted(stops, index, side="right")
        for number in np.unique(numbers):
            start, stop = self.ranges[int(number)]
            chosen = np.flatnonzero(numbers == number)
            images = _shard(self.path, start, stop)[index[chosen] - start]
            found = np.empty((len(index), *images.shape[1:]), np.uint8) if found is None else found
            found[chosen] = images
        assert found is not None
        return found


@lru_cache(maxsize=2)
def _shard(path: str, start: int, stop: int) -> np.ndarray:
    return samples.read_samples(path, start, stop).images


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} × {shape[0]} pixels"
