"""Parquet files in the layout of Hugging Face's image datasets: a struct `image` with its `bytes`, and an integer `label`."""

import json
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import UserError
from pipelines.sources.table import Listed, listed

READS_AT_ONCE = 16
KEPT_ROW_GROUPS = 4  # of one process: the rows of a shard lie together


def list_parquet(root: str, files: list[str]) -> Listed:
    """Rows of the Parquet files `files` below `root`: keys `file/row`, class names from the schema's `huggingface` metadata.

    Only labels are read. Raises UserError where a file has not the layout.
    """
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = list(pool.map(lambda file: _rows(root, file), files))
    names = [one for _, one in found if one is not None]
    return Listed(pa.concat_tables([table for table, _ in found]).unify_dictionaries(), names[0] if names else None)


def _rows(root: str, file: str) -> tuple[pa.Table, list[str] | None]:
    path = storage.join(root, file)
    parquet = _open(path)
    schema = parquet.schema_arrow
    image = schema.field("image").type if "image" in schema.names else None
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise UserError(f"{path} has no column image.bytes; expected the layout image.bytes, label, found {schema.names}")
    if "label" not in schema.names or not pa.types.is_integer(schema.field("label").type):
        raise UserError(f"{path} has no column of whole numbers named label; expected image.bytes, label, found {schema.names}")
    labels = parquet.read(columns=["label"]).column("label").cast(pa.int64()).to_pylist()
    stem, metadata = file.removesuffix(".parquet"), parquet.metadata
    sizes: list[int] = []  # of an image alone nothing is written down: that of its row group tells these images from others
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(one) for one in range(group.num_columns)]
        sizes += [sum(one.total_compressed_size for one in columns if one.path_in_schema == "image.bytes")] * group.num_rows
    table = listed(
        keys=[f"{stem}/{row:08d}" for row in range(len(labels))],
        labels=labels,
        files=[file] * len(labels),
        offsets=range(len(labels)),
        sizes=sizes,
        reasons=[None if label is not None else "no label" for label in labels],
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
        raise UserError(f"{path} is no Parquet file, or damaged: {error}; bring the file anew") from error


class RowGroups:
    """The encoded images of the row groups read last; a group that several threads want is read once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._ends: dict[tuple[str, int], list[int]] = {}  # of each version of a file, the rows up to and with each row group
        self._groups: OrderedDict[tuple[str, int, int], Future[Any]] = OrderedDict()

    def image(self, path: str, row: int, version: int) -> bytes | None:
        """The encoded bytes of one row of this version of a file; None where the row has none."""
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
                group = _open(path).read_row_group(number, columns=["image.bytes"])
                future.set_result(group.column("image").combine_chunks().field("bytes"))
            except BaseException as error:
                with self._lock:
                    self._groups.pop(key, None)
                future.set_exception(error)
        first = ends[number - 1] if number else 0
        found: bytes | None = future.result()[row - first].as_py()
        return found

    def _read_ends(self, path: str, version: int) -> list[int]:
        metadata = _open(path).metadata
        ends = list(accumulate(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)))
        self._ends[path, version] = ends
        return ends
