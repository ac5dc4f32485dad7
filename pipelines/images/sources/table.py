"""The table of a source's images: one row per image in an Arrow table, so that millions of rows need little memory and no pickling."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),  # null: not given
        ("file", pa.dictionary(pa.int32(), pa.string())),  # relative to the source's root; null: the key is the file
        ("offset", pa.int64()),  # first byte in the file, −1: the whole file; for Parquet the row index
        ("size", pa.int64()),  # bytes; −1: unknown until the image is read (Parquet)
        ("reason", pa.string()),  # why the image cannot be used, if the listing already shows it; else null
        ("version", pa.int64()),  # of the image's file (see `storage.size_and_version`); null: unknown
    ]
)


@dataclass(frozen=True)
class Listed:
    """A source's images in any order, and its class names (None: the source has only numbers).

    `empty`: names of classes whose folder or tar contains no image, with a description of its content. `notes`: lines for the user about
    skipped files.
    """

    table: pa.Table
    class_names: list[str] | None
    empty: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image of a source. `key` is unique, stable and relative to the source; `label` is −1 if the source gives none."""

    key: str
    label: int
    held_out: bool
    file: str = ""
    offset: int = -1
    size: int = -1
    reason: str = ""
    version: int = -1


class ImageRows(Sequence[ImageRow]):
    """Rows of a listing: an Arrow table (SCHEMA and `held_out`) with the interface of a list of ImageRow."""

    CHUNK = 4096  # rows converted to objects at a time

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> ImageRow: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageRows": ...
    def __getitem__(self, index: int | slice) -> "ImageRow | ImageRows":
        if isinstance(index, slice):
            places = range(len(self))[index]
            return ImageRows(self.table.slice(places.start, len(places)) if places.step == 1 else self.table.take(pa.array(places)))
        place = range(len(self))[index]
        return _rows(self.table.slice(place, 1))[0]

    def __iter__(self) -> Iterator[ImageRow]:
        for start in range(0, len(self), self.CHUNK):
            yield from _rows(self.table.slice(start, self.CHUNK))

    def column(self, name: str) -> Any:
        """One column as a numpy array, or as a list if it contains text."""
        column = self.table.column(name)
        if pa.types.is_integer(column.type):
            return column.fill_null(-1).to_numpy()
        return column.to_numpy() if pa.types.is_boolean(column.type) else column.to_pylist()


def _rows(table: pa.Table) -> list[ImageRow]:
    columns = [table.column(name).to_pylist() for name in ("key", "label", "held_out", "file", "offset", "size", "reason", "version")]
    return [
        ImageRow(key, -1 if label is None else label, held_out, file or "", offset, size, reason or "", -1 if version is None else version)
        for key, label, held_out, file, offset, size, reason, version in zip(*columns, strict=True)
    ]


def listed(
    keys: Sequence[str],
    labels: Sequence[int | None],
    files: Sequence[str | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    reasons: Sequence[str | None],
    versions: Sequence[int | None] | None = None,
) -> pa.Table:
    """The table of these columns. For images inside larger files, `Source.images` adds the versions."""
    columns = (keys, labels, files, offsets, sizes, reasons, [None] * len(keys) if versions is None else versions)
    arrays = [
        pa.array(values, pa.string()).dictionary_encode() if pa.types.is_dictionary(field.type) else pa.array(values, field.type)
        for values, field in zip(columns, SCHEMA, strict=True)
    ]
    return pa.table(arrays, schema=SCHEMA)
