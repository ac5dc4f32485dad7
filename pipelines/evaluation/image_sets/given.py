"""What `evaluate.samples` names."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation import npz
from pipelines.evaluation.image_sets.readers import (
    NPZ_REMEDY,
    GivenSamples,
    ListedReader,
    NpzReader,
    Reader,
    ShardReader,
    decode_as_it_is,
)  # fmt: skip
from pipelines.evaluation.metrics import uncertainty
from pipelines.generation import samples
from pipelines.images import sources
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.imagefolder import SUFFIXES, list_files
from pipelines.images.sources.table import ImageRows, Listed, listed
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import damaged
from pipelines.runtime.stage import IDENTITY

FORMS = "a folder of images (flat, or one folder a class), an .npz with arr_0, WebDataset tars, Parquet files, or a folder with shards/"


def find_samples(path: str) -> GivenSamples:
    """The samples at `path`. Raises UserError where there are none, for images of different sizes as far as the first one shows, and for an
    `.npz` that holds no images."""
    if path.endswith(".npz"):
        return npz_images(path)
    if samples.shards_there(path):
        return own_shards(path)
    return _listed(path)


def npz_images(path: str, name: str = "arr_0") -> GivenSamples:
    """The images of an `.npz`. Raises UserError for an array of another type or shape, and DamagedFileError."""
    if not storage.exists(path):
        raise UserError(f"evaluate.samples {path!r} is not there; expected {FORMS}")
    found = npz.member(path, name, NPZ_REMEDY)
    if found.dtype != np.uint8 or len(found.shape) != 4 or found.shape[3] != 3 or not min(found.shape[1:]):
        raise UserError(f"{name} in {path} is {found.dtype} {found.shape}; {NPZ_REMEDY}")
    count, height, width, _ = found.shape
    size, version = storage.size_and_version(path)
    about = {"kind": "npz", "images": count, "size": size, "version": version}
    labels = np.full(count, -1)
    order = np.arange(count) if found.offset is None else _fair_order(labels)  # a compressed file is read from its beginning on
    return _checked(path, GivenSamples(NpzReader(found), labels, order, (height, width), about, []))


def own_shards(path: str) -> GivenSamples:
    """Samples that `mar generate` or `mar evaluate` drew to `path`. Raises UserError where a shard is missing, and DamagedFileError."""
    ranges = samples.shards_there(path)
    expected = 0
    for start, stop in ranges:
        if start != expected:
            raise UserError(
                f"evaluate.samples {path!r} has no shard with sample {expected}", remedy="draw the rest with the command that began it"
            )
        expected = stop
    labels = np.concatenate([_labels(path, *one) for one in ranges])
    first = samples.read_samples(path, *ranges[0]).images
    identity = storage.join(path, IDENTITY)
    shards = storage.join(path, samples.SHARDS)
    versions = [storage.size_and_version(storage.join(shards, name)) for name in storage.list_directory(shards)]
    about = {
        "kind": "shards",
        "images": len(labels),
        "drawing": storage.digest(storage.read_bytes(identity)) if storage.exists(identity) else "",
        "versions": storage.digest(json.dumps(versions).encode()),
    }
    return _checked(path, GivenSamples(ShardReader(path, ranges), labels, np.arange(len(labels)), first.shape[1:3], about, []))


def _labels(path: str, start: int, stop: int) -> np.ndarray:
    file = storage.join(path, samples.SHARDS, f"samples-{start:08d}-{stop:08d}.parquet")
    try:
        labels: np.ndarray = pq.read_table(io.BytesIO(storage.read_bytes(file)), columns=["label"]).column("label").to_numpy()
        return labels
    except (pa.ArrowException, OSError, LookupError) as error:
        raise damaged(file, error, "draw these samples again") from error


def _listed(path: str) -> GivenSamples:
    """Images of a folder, of tars or of Parquet files, sorted by key; labels where the source gives them."""
    if not sources.exists(path):
        raise UserError(f"evaluate.samples {path!r} is not there; expected {FORMS}")
    found = _flat(path) if storage.is_directory(path) else None
    if found is None:
        found = sources.find_source(path).images()
    if not found.table.num_rows:
        raise UserError(f"evaluate.samples {path!r} holds no images; expected {FORMS}")
    table = found.table.sort_by([("key", "ascending"), ("offset", "ascending")])
    rows = ImageRows(table.append_column("held_out", pa.array([False] * table.num_rows)).combine_chunks())
    reasons = zip(rows.column("key"), rows.column("reason"), strict=True)
    bad = [(key, reason) for key, reason in reasons if reason and not reason.startswith("no label")]
    if bad:
        raise UserError(f"evaluate.samples {path!r}: {len(bad):,} images can't be used, the first is {bad[0][0]} ({bad[0][1]})")
    place = rows.table.schema.get_field_index("reason")
    rows = ImageRows(rows.table.set_column(place, "reason", pa.nulls(len(rows), pa.string())))  # samples need no labels
    settings = ImageSettings(source=path)
    height, width = decode_as_it_is(settings, rows[0]).shape[:2]
    described = json.dumps([rows.column("key"), rows.column("size").tolist(), rows.column("version").tolist()])
    about = {"kind": "images", "images": len(rows), "listing": storage.digest(described.encode())}
    labels = rows.column("label")
    reader: Reader = ListedReader(settings, rows, (height, width))
    return _checked(path, GivenSamples(reader, labels, _fair_order(labels), (height, width), about, found.class_names or []))


def _flat(path: str) -> Listed | None:
    """The images that lie in the folder itself, if there are any."""
    files = sorted(one for one in list_files(path) if "/" not in one[0] and one[0].lower().endswith(SUFFIXES))
    if not files:
        return None
    count = len(files)
    names, sizes, versions = (list(column) for column in zip(*files, strict=True))
    table = listed(names, [None] * count, [None] * count, [-1] * count, sizes, [None] * count, versions)
    return Listed(table, None)


def _fair_order(labels: np.ndarray) -> np.ndarray:
    """Numbers of the images, so that contiguous blocks of them are random parts with every class in equal numbers: (N,) int64."""
    return np.argsort(uncertainty.blocks(labels), kind="stable")


def _checked(path: str, found: GivenSamples) -> GivenSamples:
    if len(found) < 2:
        raise UserError(f"evaluate.samples {path!r} holds {len(found)} image(s), expected 2 or more: one image has no covariance")
    return found
