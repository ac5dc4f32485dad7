"""Parquet files with the columns of Hugging Face's image datasets: a struct `image` with the field `bytes`, and an integer `label`."""

import json
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images.sources.table import Listed, listed
from pipelines.runtime import storage
from pipelines.runtime.errors import ImageError, UserError

READS_AT_ONCE = 16
LARGEST = 2**31  # labels in a listing are smaller
KEPT_ROW_GROUPS = 4  # cached per process: the rows of a shard are adjacent


def list_parquet(root: str, files: list[str]) -> Listed:
    """Rows of the Parquet files `files` below `root`: keys `file/row`, class names from the schema's `huggingface` metadata.

    Reads only the labels. Raises UserError if a file has other columns, or if two files have different class names.
    """
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = list(pool.map(lambda file: _rows(root, file), files))
    named = [(file, names) for file, (_, names) in zip(files, found, strict=True) if names is not None]
    for file, names in named[1:]:
        if names != named[0][1]:
            raise UserError(
                f"{storage.join(root, file)} has the class names {_shortened(names)}, but {storage.join(root, named[0][0])} has "
                f"{_shortened(named[0][1])}: the same label would mean two classes",
                remedy="use files of one data set",
            )
    return Listed(pa.concat_tables([table for table, _ in found]).unify_dictionaries(), named[0][1] if named else None)


def _shortened(names: list[str]) -> str:
    return f"{names[:5]}{' …' if len(names) > 5 else ''}"


def _rows(root: str, file: str) -> tuple[pa.Table, list[str] | None]:
    path = storage.join(root, file)
    parquet = _open(path)
    schema = parquet.schema_arrow
    image = schema.field("image").type if "image" in schema.names else None
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise UserError(f"{path} has no column image.bytes; expected the columns image.bytes and label, found {schema.names}")
    if "label" not in schema.names:
        raise UserError(f"{path} has no column label; expected the columns image.bytes and label, found {schema.names}")
    if not pa.types.is_integer(schema.field("label").type):
        raise UserError(f"{path} has a column label of type {schema.field('label').type}; expected integers that start at 0")
    given = parquet.read(columns=["label"]).column("label").to_pylist()
    labels = [None if label is None or abs(label) >= LARGEST else label for label in given]
    stem, metadata = file.removesuffix(".parquet"), parquet.metadata
    sizes: list[int] = []  # the file has no size per image: the size of the row group serves for change detection
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        sizes += [sum(column.total_compressed_size for column in columns if column.path_in_schema == "image.bytes")] * group.num_rows
    table = listed(
        keys=[f"{stem}/{row:08d}" for row in range(len(labels))],
        labels=labels,
        files=[file] * len(labels),
        offsets=range(len(labels)),
        sizes=sizes,
        reasons=[
            None if kept is not None else "no label" if label is None else f"label {label} is out of range"
            for kept, label in zip(labels, given, strict=True)
        ],
    )
    return table, _class_names(schema.metadata or {})


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    return [str(name) for name in names] if names else None


def _open(path: str) -> pq.ParquetFile:
    system, inner = storage.filesystem(path)
    try:
        return pq.ParquetFile(system.open_input_file(inner), pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file, or damaged: {error}", remedy="copy the file again from its source") from error


class RowGroups:
    """A cache of the most recent row groups' encoded images. A group that several threads request is read once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._ends: dict[tuple[str, int], list[int]] = {}  # (path, version) → cumulative rows per row group
        self._groups: OrderedDict[tuple[str, int, int], Future[Any]] = OrderedDict()

    def image(self, path: str, row: int, version: int) -> bytes:
        """The encoded bytes of one row of this version of a file. Raises ImageError, with the null field, if there are none."""
        with self._lock:
            ends = self._ends.get((path, version)) or self._read_ends(path, version)
            number = bisect_right(ends, row)
            key = (path, version, number)
            future = self._groups.get(key)
            mine = future is None
            if future is None:
                future = self._groups[key] = Future()
                while len(self._groups) > KEPT_ROW_GROUPS:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end(key)
        if mine:
            try:
                future.set_result(_encoded(_open(path), number))
            except BaseException as error:
                with self._lock:
                    self._groups.pop(key, None)
                future.set_exception(error)
        first = ends[number - 1] if number else 0
        encoded, reasons = future.result()
        if row - first in reasons:
            raise ImageError(reasons[row - first])
        found: bytes = encoded[row - first].as_py()
        return found

    def _read_ends(self, path: str, version: int) -> list[int]:
        metadata = _open(path).metadata
        ends = list(accumulate(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)))
        self._ends[path, version] = ends
        return ends


def _encoded(parquet: pq.ParquetFile, number: int) -> tuple[pa.Array, dict[int, str]]:
    """The encoded images of one row group; and, for each row without an image, its index in the group and which field is null."""
    images = parquet.read_row_group(number, columns=["image.bytes"]).column("image").combine_chunks()
    encoded = images.field("bytes")
    if not images.null_count and not encoded.null_count:
        return encoded, {}
    has_path = parquet.schema_arrow.field("image").type.get_field_index("path") >= 0
    whole = parquet.read_row_group(number, columns=["image.path"]).column("image").to_pylist() if has_path else images.to_pylist()
    reasons = {}
    for row in range(len(whole)):
        if whole[row] is None:
            reasons[row] = "image is null"
        elif not encoded[row].is_valid:
            path = whole[row].get("path")
            given = f", only image.path is given: {path!r}" if path is not None else ""
            reasons[row] = "image.bytes and image.path are null" if has_path and path is None else f"image.bytes is null{given}"
    return encoded, reasons
