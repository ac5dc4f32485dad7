"""The record beside each shard (what the shard holds, its checksum, statistics and rejected images) and `rejected.parquet`, which lists
the rejected images of the whole cache."""

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
IMAGE_DIGESTS = "image_sha256"  # in a shard's record: of every row, also of rejected ones


def shard_paths(path: str, index: int) -> tuple[str, str]:
    """The shard, and its record: rows, checksum, statistics, rejects."""
    shard = storage.join(path, SHARDS, shard_name(index))
    return shard, shard.removesuffix(".arrow") + ".json"


def finished_record(images: ImageSettings, path: str, rows: ImageRows, index: int, start: int) -> dict[str, Any] | None:
    """The record of shard `index`, which begins at row `start`, or None where it has to be made: it is not there, has not the recorded
    size and checksum, or rejected images that have other bytes now."""
    file, record_path = shard_paths(path, index)
    record = read_record(record_path)
    if record is None or not storage.exists(file) or storage.size(file) != record["bytes"]:
        return None
    if storage.digest(storage.read_bytes(file)) != record["sha256"]:
        return None
    mended = any(read_with_digest(images, rows[start + one["row"]])[1] != one["sha256"] for one in record["rejected"])
    return None if mended else record


@dataclass(frozen=True)
class RejectedRow:
    """An image that a shard leaves out: `row` is its place in the shard."""

    row: int
    key: str
    reason: str
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """What lies beside each shard."""

    format_version: int
    name: str
    rows: int
    sha256: str
    bytes: int
    statistics: LatentStatistics | None
    deviation: dict[str, float] | None
    rejected: list[RejectedRow]


def read_record(path: str) -> dict[str, Any] | None:
    """A shard's record, or None where it is not there, is damaged, or is of another format. The digests of its images, which make up
    nearly all of it, are left out: `read_image_digests` reads these."""
    record = _read_record(path)
    return None if record is None else {name: value for name, value in record.items() if name != IMAGE_DIGESTS}


def read_image_digests(path: str, index: int) -> list[str] | None:
    """SHA-256 of the bytes of each image that finished shard `index` was made of, in the order of its rows, "" where they could not be
    read; empty in a record of an earlier version of mar-ray, None where the shard has no record."""
    record = _read_record(shard_paths(path, index)[1])
    return None if record is None else list(record.get(IMAGE_DIGESTS, []))


def _read_record(path: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = storage.read_json(path, ShardRecord)
    except (FileNotFoundError, DamagedFileError):
        return None
    return record if record["format_version"] == FORMAT_VERSION else None


def read_rejected(path: str) -> list[dict[str, str]]:
    """Every image that the cache at `path` leaves out: key, reason, sha256. Raises FileNotFoundError, and DamagedFileError."""
    file = storage.join(path, REJECTED)
    data = storage.read_bytes(file)
    try:
        rows: list[dict[str, str]] = pa.parquet.read_table(pa.BufferReader(data)).select(REJECTED_SCHEMA.names).to_pylist()
    except (pa.ArrowException, OSError, LookupError) as error:
        raise damaged(file, error, "run `mar cache` with the cache's settings: it writes the file again") from error
    return rows


def write_rejected(path: str, records: list[dict[str, Any]]) -> None:
    """Write `rejected.parquet` of the cache at `path` from the records of its shards."""
    rejected = [{name: one[name] for name in REJECTED_SCHEMA.names} for record in records for one in record["rejected"]]
    table = pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    storage.write_bytes(storage.join(path, REJECTED), bytes(sink.getvalue()))
