"""Reads the encoded bytes of one image from its place in the listing."""

from pipelines.images.sources.parquet import RowGroups
from pipelines.images.sources.patterns import root_of
from pipelines.images.sources.table import ImageRow
from pipelines.runtime import storage

_row_groups = RowGroups()


def read(source: str, row: ImageRow) -> bytes:
    """The encoded bytes of one image. Raises OSError when they cannot be read, ImageError if the source contains none."""
    path = storage.join(root_of(source), row.file or row.key)
    if row.file.endswith(".parquet"):
        return _row_groups.image(path, row.offset, row.version)
    return storage.read_bytes(path) if row.offset < 0 else storage.read_range(path, row.offset, row.size)
