"""Reads a latent cache: shards are memory-mapped, and their SHA-256 is verified on first use."""

import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.caching.latent_format import FORMAT_VERSION, MANIFEST, SHARDS, Manifest
from pipelines.caching.local_shards import LocalShards
from pipelines.caching.shard_checks import ShardChecks, check_size, compare, refuse_condemned
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import damaged, parsed


@dataclass(frozen=True)
class ShardEntry:
    """Entry of a shard in the manifest."""

    name: str
    rows: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Tokenizer:
    """Entry of the tokenizer in the manifest."""

    digest: str
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Versioned:
    format_version: int


@dataclass(frozen=True)
class _ManifestRecord(Manifest):
    """The manifest with the types of the items in its lists and objects."""

    shards: list[ShardEntry]  # type: ignore[assignment]
    tokenizer: Tokenizer  # type: ignore[assignment]


def read_manifest(path: str) -> tuple[Manifest, str]:
    """The manifest of the cache at `path` and its SHA-256. Raises DamagedFileError, and UserError for another format version."""
    file = storage.join(path, MANIFEST)
    remedy = "run `mar cache` with the cache's settings: it writes the manifest again and keeps the shards"
    data = storage.read_bytes(file)
    version = parsed(data, file, _Versioned, remedy)["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {version!r}, expected {FORMAT_VERSION}",
            remedy="read it with the version of mar-ray that wrote it, or write the cache again",
        )
    values = parsed(data, file, _ManifestRecord, remedy)
    return Manifest(**{item.name: values[item.name] for item in fields(Manifest) if item.name in values}), storage.digest(data)


class LatentCache:
    """A finished cache, for reading any rows in any order. A shard is memory-mapped on first use, after its SHA-256 has been verified (see
    `checked_beside`); shards on S3 are first copied to a local disk. A pickle of this object contains only paths."""

    def __init__(self, path: str, local: str = "", local_gb: float = 50.0, condemned: bool = False) -> None:
        """`local`: folder on a local disk for copies of shards, of at most `local_gb`; for a cache on S3 the default is the temporary
        folder. `condemned`: allow shards that are marked as damaged.

        Raises UserError when `path` has no finished cache of this format or has damaged shards, or when `local_gb` is too small. Methods
        that read a shard raise UserError when it does not match the manifest.
        """
        self.path = path
        self._arguments = (path, local, local_gb, condemned)
        if not storage.exists(storage.join(path, MANIFEST)):
            raise UserError(
                f"{path!r} is not a finished latent cache ({MANIFEST} is missing)", remedy=f"run `mar cache` with cache.path={path}"
            )
        self.manifest, self.digest = read_manifest(path)
        if not condemned:
            refuse_condemned(path, len(self.manifest.shards))
        self.checks, self._beside = ShardChecks(self._check), False
        self._ends = np.cumsum([shard["rows"] for shard in self.manifest.shards])
        self._starts = self._ends - [shard["rows"] for shard in self.manifest.shards]
        self._opened: OrderedDict[int, _Shard] = OrderedDict()
        self._halves: dict[int, np.ndarray] = {}
        self._labels = np.empty(self.manifest.rows, np.int64)  # filled as shards are opened
        self.local: LocalShards | None = None
        if local or not storage.is_local(path):
            folder = storage.join(local or storage.join(tempfile.gettempdir(), "mar-shards"), self.digest[:16])
            self.local = LocalShards(path, self.manifest.shards, folder, int(local_gb * 1e9))

    def __reduce__(self) -> tuple[type["LatentCache"], tuple[str, str, float, bool]]:
        return LatentCache, self._arguments

    def checked_beside(self) -> ShardChecks:
        """Stop verifying shards before they are mapped; from now on the caller starts the checks and waits for them, in parallel with its
        work."""
        self._beside = True
        return self.checks

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(2C, h, w)"""
        side = self.manifest.latent_size
        return 2 * self.manifest.latent_channels, side, side

    def take(self, indices: np.ndarray, flipped: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Moments (N, 2C, h, w) in the cache's dtype, of the mirror image if `flipped` (N,) is true, and labels int64 (N,).

        `out`: array to write the moments to.
        """
        numbers, rows = self._places(indices)
        moments = np.empty((len(rows), *self.moments_shape), dtype=self.manifest.dtype) if out is None else out
        halves = self._halves_of(numbers)
        chosen = (2 * numbers + np.asarray(flipped, bool)).tolist()
        records = [halves[half][row] for half, row in zip(chosen, rows.tolist(), strict=True)]
        if records:  # one call for all records: per-call overhead dominates the copies
            np.concatenate(records, out=moments.reshape(-1))
        return moments, self._labels[indices]

    def labels(self) -> np.ndarray:
        """Labels of all rows, int64 (rows,)."""
        for number in range(len(self._ends)):
            self._shard(number)
        return self._labels.copy()

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the images in these rows."""
        numbers, rows = self._places(indices)
        return [self._shard(number).keys[row].as_py() for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)]

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard index, and row in the shard, of each row of the cache."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of a latent cache of {len(self)}")
        numbers = np.searchsorted(self._ends, indices, side="right")
        return numbers, indices - self._starts[numbers]

    def _halves_of(self, numbers: np.ndarray) -> dict[int, np.ndarray]:
        """Moments of these shards: of images at key 2 · number, of mirror images at key 2 · number + 1."""
        all_open = len(self._opened) == len(self._ends)  # then no shard is closed any more
        if all_open and self._halves:
            return self._halves
        halves = {}
        for number in list(self._opened) if all_open else set(numbers.tolist()):
            shard = self._shard(number)
            halves[2 * number], halves[2 * number + 1] = shard.moments, shard.flipped
        if all_open:
            self._halves = halves
        return halves

    def _shard(self, number: int) -> "_Shard":
        shard = self._opened.get(number)
        if shard is None:
            shard = self._opened[number] = self._open(number)
            self._labels[self._starts[number] : self._ends[number]] = shard.labels
        elif self.local is not None:
            self._opened.move_to_end(number)
        return shard

    def _open(self, number: int) -> "_Shard":
        entry = self.manifest.shards[number]
        if not self._beside:
            self._check(number)
        if self.local is None:
            return _Shard(storage.join(self.path, SHARDS, entry["name"]), entry["bytes"])
        while len(self._opened) >= max(1, self.local.capacity - 1):
            self._opened.popitem(last=False)  # a memory map keeps the disk space of an evicted file
        return _Shard(self.local.path(number), entry["bytes"])

    def _check(self, number: int) -> None:
        if self.local is None:
            compare(self.path, self.manifest.shards[number])
        else:
            self.local.compare(number)


class _Shard:
    """Views of one shard's columns: labels (N,), keys, and moments of images and mirror images (N, 2C · h · w)."""

    def __init__(self, path: str, size: int) -> None:
        check_size(path, size)
        try:
            with pa.memory_map(storage.filesystem(path)[1]) as source:  # the views keep the map; the file is closed, because a cache can
                self._batch = pa.ipc.open_file(source).get_batch(0)  # have more shards than a process may open files
            self.labels: np.ndarray = self._batch.column("label").to_numpy()
            self.moments = self._view("moments")
            self.flipped = self._view("moments_flipped")
        except (pa.ArrowException, OSError, LookupError, AttributeError, ValueError) as error:
            raise damaged(path, error, "run `mar verify` on the cache, then `mar cache` to make this shard again") from error

    def _view(self, name: str) -> np.ndarray:
        column = self._batch.column(name)
        values: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
        return values.reshape(-1, column.type.list_size)

    @cached_property
    def keys(self) -> pa.StringArray:
        return self._batch.column("key")
