"""The listing of an image source: all images, sorted by key and split into a training part and a held-out part."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images import sources
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.class_folders import counted, first
from pipelines.images.sources.imagefolder import SUFFIXES
from pipelines.images.sources.table import ImageRows, Listed
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import check

MOST_CLASSES = 2**16  # limit for a source without class names, unless images.classes is larger; ImageNet-21k has 21,843


@dataclass(frozen=True)
class ImageListing:
    """All images of a source, sorted by key. A label is the index of its class in `class_names`."""

    rows: ImageRows
    class_names: list[str]
    stamp: str = ""  # identifies the tars or Parquet files that were listed
    notes: tuple[str, ...] = ()  # lines for the user about skipped files

    @property
    def remarks(self) -> list[str]:
        """The notes, and a line that names the classes without a training image."""
        train = self.train()
        usable = train.column("label")[train.table.column("reason").is_null().to_numpy()]
        counts = np.bincount(usable, minlength=len(self.class_names))
        missing = [name for name, count in zip(self.class_names, counts.tolist(), strict=True) if not count]
        if not missing:
            return list(self.notes)
        have = "has" if len(missing) == 1 else "have"
        whole = len(self.class_names)
        return [*self.notes, f"{len(missing):,} of {whole:,} classes {have} no training image: {first(missing, len(missing))}"]

    def train(self) -> ImageRows:
        return ImageRows(self.rows.table.filter(pc.invert(self.rows.table.column("held_out"))))

    def held_out(self) -> ImageRows:
        return ImageRows(self.rows.table.filter(self.rows.table.column("held_out")))

    @cached_property
    def digest(self) -> str:
        """Identifies this data: `listing_digest` of all rows, including the split."""
        return listing_digest(self, self.rows)


def listing_digest(listing: ImageListing, rows: ImageRows) -> str:
    """The number of rows, and the SHA-256 of the class names and of the rows' keys, labels, sizes in bytes and split."""
    digest = hashlib.sha256(json.dumps(listing.class_names).encode())
    digest.update(json.dumps(rows.column("key")).encode())
    for name, kind in (("label", "<i8"), ("size", "<i8"), ("held_out", "u1")):
        digest.update(np.ascontiguousarray(rows.column(name), dtype=kind).tobytes())
    return f"{len(rows)} images, sha256 {digest.hexdigest()}"


class Images:
    """An image source that the stages of a run share; it is listed once, on first access to `listing`.

    `kept`: path of a stored listing (see `keep_listing`), so that unchanged tars and Parquet files are not read again.
    """

    def __init__(self, settings: ImageSettings, kept: str = "") -> None:
        self.settings, self._kept = settings, kept

    @cached_property
    def listing(self) -> ImageListing:
        """All images of the source. Raises UserError as `list_images` does."""
        return list_images(self.settings, self._kept)

    def __getstate__(self) -> dict[str, object]:
        return {"settings": self.settings, "_kept": self._kept}  # a listing of a million rows is not pickled


def list_images(settings: ImageSettings, kept: str = "") -> ImageListing:
    """List the source, sorted by key, and split it.

    The classes of a folder tree are the sorted names of all class folders, in any part. Hidden files and folders are skipped. Of several
    images with the same key the first is used. An image that the listing already shows to be unusable has a `reason`. If the file `kept`
    (see `keep_listing`) was written for the same tars or Parquet files, they are not read again. Raises UserError when there is no source,
    no class folder, a class folder without images (unless the settings allow it), no training image, or no held-out image although the
    settings require some.
    """
    check(images=settings)
    source = sources.find_source(settings.source, settings.format)
    stamp = source.stamp and storage.digest(json.dumps([source.stamp, *_listing_settings(settings)]).encode())
    listing = kept_listing(kept) if kept and stamp else None
    if listing is None or listing.stamp != stamp:
        by_folder = settings.held_out_folder != ""
        if by_folder and source.form != "imagefolder":
            raise UserError(
                f"images.held_out_folder {settings.held_out_folder!r} needs a folder tree, but images.source {settings.source!r} has "
                f"the form {source.form}",
                remedy="set images.held_out_share instead",
            )
        found = source.images(by_folder)
        if not found.table.num_rows:
            layout = f"{'part/class/image' if by_folder else 'class/image'} with {', '.join(SUFFIXES)}"
            raise UserError(
                f"images.source {settings.source!r} holds no {'class folders with ' if source.form == 'imagefolder' else ''}images; "
                f"expected {settings.source}/{layout}, tars, or Parquet files; found {[name for name, *_ in source.files[:5]]}"
            )
        _check_empty_classes(settings, found)
        listing = replace(_split(settings, found), notes=found.notes)
    _check_parts(settings, listing)
    return replace(listing, stamp=stamp)


def _split(settings: ImageSettings, found: Listed) -> ImageListing:
    """Sort and split the images; set a reason for duplicate keys and labels out of range."""
    table = found.table.sort_by([("key", "ascending"), ("offset", "ascending")])
    keys = table.column("key").to_pylist()
    labels = table.column("label").fill_null(-1).to_numpy()
    named = found.class_names
    classes = settings.classes or (len(named) if named is not None else MOST_CLASSES)
    reasons = table.column("reason").to_pylist()
    for place in np.flatnonzero((labels < 0) | (labels >= classes)).tolist():
        given = table.column("label")[place].as_py()
        reasons[place] = reasons[place] or ("no label" if given is None else f"label {given} is out of range, expected 0 to {classes - 1}")
    for place in range(1, len(keys)):
        if keys[place] == keys[place - 1]:
            reasons[place] = "duplicate key: the first image with this key is used"
    usable = labels[[reason is None for reason in reasons]]
    if named is None or settings.classes > len(named):
        count = settings.classes or int(usable.max(initial=-1)) + 1
        named = [*(named or []), *map(str, range(len(named or []), count))]
    if settings.held_out_folder:
        held_out = [key.split("/")[0] == settings.held_out_folder for key in keys]
    else:
        held_out = [_hash_share(key) < settings.held_out_share for key in keys] if settings.held_out_share else [False] * len(keys)
    table = table.set_column(table.schema.get_field_index("reason"), "reason", pa.array(reasons, pa.string()))
    return ImageListing(ImageRows(table.append_column("held_out", pa.array(held_out)).combine_chunks()), named)


def _listing_settings(settings: ImageSettings) -> list[object]:
    return [settings.classes, settings.held_out_share, settings.held_out_folder, settings.allow_empty_classes]


def keep_listing(path: str, listing: ImageListing) -> None:
    """Write a listing as one Arrow file."""
    metadata = {"class_names": json.dumps(listing.class_names), "stamp": listing.stamp}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, listing.rows.table.schema.with_metadata(metadata)) as writer:
        writer.write_table(listing.rows.table.replace_schema_metadata(metadata))
    storage.write_bytes(path, bytes(sink.getvalue()))


def kept_listing(path: str) -> ImageListing | None:
    """The listing that `keep_listing` wrote, or None if the file is missing or damaged. Older files have no column `version`."""
    if not storage.exists(path):
        return None
    data = storage.read_bytes(path)
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        class_names, stamp = json.loads(table.schema.metadata[b"class_names"]), table.schema.metadata[b"stamp"].decode()
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # pyarrow raises OSError for most damage
        return None
    if "version" not in table.schema.names:
        table = table.append_column("version", pa.nulls(table.num_rows, pa.int64()))
    return ImageListing(ImageRows(table.replace_schema_metadata(None)), class_names, stamp)


def _hash_share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, so that images keep their part of the split when a source grows."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32


def _check_empty_classes(settings: ImageSettings, found: Listed) -> None:
    if found.empty and not settings.allow_empty_classes:
        named = [f"{name} ({content})" for name, content in found.empty.items()]
        raise UserError(
            f"images.source {settings.source!r} has {counted(len(named), 'class folder')} without images: {first(named, len(named))}",
            remedy="add images, remove these folders or rename them with a leading dot (hidden folders are skipped), or set "
            "images.allow_empty_classes=true to keep them as classes",
        )


def _check_parts(settings: ImageSettings, listing: ImageListing) -> None:
    images, held_out = len(listing.rows), len(listing.held_out())
    if settings.held_out_folder and not held_out:
        raise UserError(
            f"images.held_out_folder {settings.held_out_folder!r} holds no images below {settings.source!r}; "
            f"expected one of the folders {sorted({row.key.split('/')[0] for row in listing.rows})}"
        )
    if settings.held_out_share and not held_out:
        raise UserError(
            f"images.held_out_share {settings.held_out_share} holds out none of the {images} images of {settings.source!r}",
            remedy="raise it, or add images",
        )
    if held_out == images:
        raise UserError(
            f"all {images} images of {settings.source!r} are held out, expected some to train on", remedy="lower images.held_out_share"
        )
