"""Kept features: Arrow shards beside the images' own, so that metrics can be computed again without drawing or reading an image."""

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluation.features.sizes import Features
from pipelines.runtime import storage
from pipelines.runtime.records import damaged

NAME = re.compile(r"features-(\d{9})-(\d{9})\.arrow")
REMEDY = "delete it, and summary.json beside its folder if it is there, and run the same command again: these features are computed again"
NUMBERS = ("index", "label", "predicted")


@dataclass(frozen=True)
class FeatureShard:
    """The features of the images at the places `start` to `stop` of a set.

    `index` (N,) int64: each image's number in the set, by which random draws are made, whatever order the images were read in. `label` and
    `predicted` (N,) int64: −1 where they are not known.
    """

    start: int
    stop: int
    index: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    features: Features


def write_shard(path: str, shard: FeatureShard) -> None:
    """`path/features-START-STOP.arrow`, atomically. A file that a power failure cuts off is noticed, and computed again."""
    columns: dict[str, Any] = {name: pa.array(getattr(shard, name), pa.int64()) for name in NUMBERS}
    for name, values in shard.features._asdict().items():
        if not values.shape[1]:  # the network has none, and Arrow no lists of no values
            continue
        flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    _write(_file(path, shard.start, shard.stop), sink.getvalue())


def shards_there(path: str) -> list[tuple[int, int]]:
    """(start, stop) of each shard below `path`, sorted."""
    matches = (NAME.fullmatch(name) for name in storage.list_directory(path))
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


@dataclass(frozen=True)
class KeptFeatures:
    """The features of one set of images, in the order in which its images were read: `places` are counted in it."""

    path: str
    ranges: tuple[tuple[int, int], ...]  # (start, stop) of the shards, sorted

    def numbers(self) -> dict[str, np.ndarray]:
        """`index`, `label` and `predicted` of all images, (N,) int64 each."""
        parts = [self._table(one) for one in self.ranges]
        return {name: np.concatenate([part.column(name).to_numpy() for part in parts]) for name in NUMBERS}

    def counts(self) -> np.ndarray:
        """Images in each shard; fewer than its places where some could not be read."""
        return np.array([self._table(one).num_rows for one in self.ranges])

    def column(self, number: int, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """`pooled`, `spatial` or `logits` of the shard with this number, float32 (N, D); only these rows if given."""
        table = self._table(self.ranges[number])
        if name in Features._fields and name not in table.column_names:  # the network has none
            return np.zeros((table.num_rows, 0), np.float32)[slice(None) if rows is None else rows]
        column = table.column(name).combine_chunks()
        width = column.type.list_size
        values = column.values.to_numpy().reshape(-1, width)[column.offset :][: len(column)]
        return values if rows is None else values[rows]

    def index(self, number: int) -> np.ndarray:
        """`index` of the images of one shard."""
        found: np.ndarray = self._table(self.ranges[number]).column("index").to_numpy()
        return found

    def _table(self, place: tuple[int, int]) -> pa.Table:
        file = _file(self.path, *place)
        try:
            if storage.is_local(file):
                with pa.memory_map(storage.filesystem(file)[1]) as mapped:
                    return pa.ipc.open_file(mapped).read_all()
            return pa.ipc.open_file(pa.py_buffer(storage.read_bytes(file))).read_all()
        except (pa.ArrowException, OSError, LookupError, ValueError) as error:
            raise damaged(file, error, REMEDY) from error


def is_whole(path: str, place: tuple[int, int], predicted: bool) -> bool:
    """Whether the shard is there and can be read; `predicted`: and knows what a classifier said."""
    if not storage.exists(_file(path, *place)):
        return False
    try:
        numbers = KeptFeatures(path, (place,)).numbers()
    except ValueError:
        return False
    return not predicted or bool((numbers["predicted"] >= 0).all())


def pieces(counts: Sequence[int] | np.ndarray, start: int, stop: int) -> Iterator[tuple[int, slice]]:
    """Of shards with so many images each: which, and which rows of it, hold the images `start` to `stop`."""
    first = 0
    for number, count in enumerate(counts):
        if first < stop and start < first + count:
            yield number, slice(max(0, start - first), min(int(count), stop - first))
        first += int(count)


def _write(file: str, data: pa.Buffer) -> None:
    if not storage.is_local(file):
        storage.write_bytes(file, bytes(data))
        return
    inner = storage.filesystem(file)[1]
    temporary = f"{inner}.{uuid.uuid4().hex[:8]}{storage.PARTIAL}"
    with storage.writing(file):
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        try:
            with open(temporary, "wb") as stream:  # not synced to the disk, which would take longer than the features of a batch
                stream.write(data)
            os.replace(temporary, inner)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def _file(path: str, start: int, stop: int) -> str:
    return storage.join(path, f"features-{start:09d}-{stop:09d}.arrow")
