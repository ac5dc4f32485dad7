"""Samples on disk: Parquet shards of drawn images, and the names of their PNG files."""

import io
import json
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.images.grid import encoded
from pipelines.runtime import storage
from pipelines.runtime.records import damaged

SHARDS = "shards"
SHARD_NAME = re.compile(r"samples-(\d{8})-(\d{8})\.parquet")
COLUMNS = {"index": "int64", "label": "int64", "key": "string", "out_of_range": "float32"}  # in addition to `image`


@dataclass(frozen=True)
class Samples:
    """N samples with indices from `start`. `out_of_range`: share of each sample's latents that left the range of the data or were clamped
    to its bounds."""

    start: int
    numbers: np.ndarray  # (N,) int64
    labels: np.ndarray  # (N,) int64
    images: np.ndarray  # (N, H, W, 3) uint8
    out_of_range: np.ndarray  # (N,) float32


def key(index: int) -> str:
    """The key of sample `index`: unique, and sorted by number."""
    return f"sample-{index:08d}"


def write_samples(path: str, samples: Samples) -> None:
    """Write one shard, `path/shards/samples-START-STOP.parquet`, atomically; equal samples give equal bytes.

    `load_dataset("parquet", …)` decodes its column `image`.
    """
    stop = samples.start + len(samples.labels)
    images = [{"bytes": encoded(image), "path": None} for image in samples.images]
    features = {"image": {"_type": "Image"}, **{name: {"dtype": kind, "_type": "Value"} for name, kind in COLUMNS.items()}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), *((n, pa.type_for_alias(k)) for n, k in COLUMNS.items())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = [images, samples.numbers, samples.labels, [key(number) for number in samples.numbers], samples.out_of_range]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none")  # PNG is already compressed
    storage.write_bytes(storage.join(path, SHARDS, _shard_name(samples.start, stop)), sink.getvalue())


def read_samples(path: str, start: int, stop: int) -> Samples:
    """Read a shard written by `write_samples`. Raises FileNotFoundError, and DamagedFileError."""
    file = storage.join(path, SHARDS, _shard_name(start, stop))
    data = storage.read_bytes(file)
    try:
        table = pq.read_table(io.BytesIO(data))
        images = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"].as_py()))) for image in table.column("image")])
        numbers, labels, out_of_range = (table.column(name).to_numpy() for name in ("index", "label", "out_of_range"))
    except (pa.ArrowException, OSError, SyntaxError, ValueError, TypeError, LookupError) as error:
        summary = storage.join(path, "summary.json")
        remedy = f"delete it, and {summary} if it exists, and run the same command again to draw these samples again"
        raise damaged(file, error, remedy) from error
    return Samples(start, numbers, labels, images, out_of_range)


def shards_there(path: str) -> list[tuple[int, int]]:
    """(start, stop) of each existing shard in `path`, sorted."""
    matches = (SHARD_NAME.fullmatch(name) for name in storage.list_directory(storage.join(path, SHARDS)))
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


def shards_to_draw(total: int, batch: int, existing: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The missing shards for samples 0 … total − 1, each of at most `batch` samples; `existing` shards may have other sizes."""
    shards = []
    position = 0
    for start, stop in [*existing, (total, total)]:
        shards += [(first, min(first + batch, start)) for first in range(position, start, batch)]
        position = max(position, stop)
    return shards


def folder_name(class_name: str) -> str:
    """The class name as a visible folder name; characters with a meaning in paths are written as %XX."""
    escaped = re.sub(r"[%/\0]|^\.", lambda found: f"%{ord(found[0]):02X}", class_name)
    return escaped or "%"


def _shard_name(start: int, stop: int) -> str:
    return f"samples-{start:08d}-{stop:08d}.parquet"
