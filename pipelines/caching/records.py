"""The record next to each shard (row count, checksum, statistics and rejected images) and `rejected.parquet`, which lists the rejected
images of the whole cache."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipelines.caching.latent_format import FORMAT_VERSION, SHARDS, LatentStatistics, shard_name
from pipelines.images.reading import read_with_digest
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError
from pipelines.runtime.records import damaged

REJECTED = "rejected.parquet"
REJECTED_SCHEMA = pa.schema([("key", pa.string()), ("reason", pa.string()), ("sha256", pa.string())])
IMAGE_DIGESTS = "image_sha256"  # in a shard's record: of all rows, including rejected ones


def shard_paths(path: str, index: int) -> tuple[str, str]:
    """Paths of a shard and its record."""
    shard = storage.join(path, SHARDS, shard_name(index))
    return shard, shard.removesuffix(".arrow") + ".json"


def finished_record(images: ImageSettings, path: str, rows: ImageRows, index: int, start: int) -> dict[str, Any] | None:
    """The record of shard `index`, which begins at row `start`; None if the shard has to be made: it is missing, its size or checksum is
    wrong, or images that it rejected have changed."""
    file, record_path = shard_paths(path, index)
    record = read_record(record_path)
    if record is None or not storage.exists(file) or storage.size(file) != record["bytes"]:
        return None
    if storage.digest(storage.read_bytes(file)) != record["sha256"]:
        return None
    repaired = any(read_with_digest(images, rows[start + image["row"]])[1] != image["sha256"] for image in record["rejected"])
    return None if repaired else record


@dataclass(frozen=True)
class RejectedRow:
    """An image that a shard rejected; `row` is its index in the shard."""

    row: int
    key: str
    reason: str
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """Content of the record next to each shard."""

    format_version: int
    name: str
    rows: int
    sha256: str
    bytes: int
    statistics: LatentStatistics | None
    deviation: dict[str, float] | None
    rejected: list[RejectedRow]


def read_record(path: str) -> dict[str, Any] | None:
    """A shard's record; None if it is missing, damaged or has another format. The image digests, most of its size, are left out: see
    `read_image_digests`."""
    record = _read_record(path)
    return None if record is None else {name: value for name, value in record.items() if name != IMAGE_DIGESTS}


def read_image_digests(path: str, index: int) -> list[str] | None:
    """SHA-256 of the bytes of each image of finished shard `index`, in row order ("" if unreadable); empty for a record of an earlier
    version of mar-ray, None if the shard has no record."""
    record = _read_record(shard_paths(path, index)[1])
    return None if record is None else list(record.get(IMAGE_DIGESTS, []))


def _read_record(path: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = storage.read_json(path, ShardRecord)
    except (FileNotFoundError, DamagedFileError):
        return None
    return record if record["format_version"] == FORMAT_VERSION else None


def read_rejected(path: str) -> list[dict[str, str]]:
    """All images that the cache at `path` rejected: key, reason, sha256. Raises FileNotFoundError, and DamagedFileError."""
    file = storage.join(path, REJECTED)
    data = storage.read_bytes(file)
    try:
        rows: list[dict[str, str]] = pa.parquet.read_table(pa.BufferReader(data)).select(REJECTED_SCHEMA.names).to_pylist()
    except (pa.ArrowException, OSError, LookupError) as error:
        raise damaged(file, error, "run `mar cache` with the cache's settings to write the file again") from error
    return rows


def write_rejected(path: str, records: list[dict[str, Any]]) -> None:
    """Write the cache's `rejected.parquet` from the records of its shards."""
    rejected = [{name: image[name] for name in REJECTED_SCHEMA.names} for record in records for image in record["rejected"]]
    table = pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    storage.write_bytes(storage.join(path, REJECTED), bytes(sink.getvalue()))
