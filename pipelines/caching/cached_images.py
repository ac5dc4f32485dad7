"""Checks whether a source still contains the images that a cache was made from: by its listing and, for files written since, by the SHA-256
of the images' bytes, which the shards' records contain. A copied data set counts as the same source."""

from typing import Any

import numpy as np

from pipelines.caching.latent_format import MANIFEST, SHARDS
from pipelines.caching.records import read_record
from pipelines.caching.shards import Compared, Shard, compare_images
from pipelines.images.listing import ImageListing, keep_listing, kept_listing
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import LISTING, Changes, changes, refusal, touched
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.stage import IDENTITY, Stage, read_identity

TRAIN_LISTING = "images.train_listing"
ENCODE_AGAIN = "check a sample with `mar verify --sample N`"


def settle_identity(
    images: ImageSettings,
    path: str,
    listing: ImageListing,
    shards: dict[int, Shard],
    identity: dict[str, Any],
    stage: Stage,
    check: bool,
) -> dict[str, Any]:
    """The identity of the cache at `path` (existing or new) for the images in `listing`. `check`: read every image again, not only those
    in files with another version.

    If all images have the same bytes as before, the identity is unchanged, wherever the files are. If all changed images are images that
    the cache rejected, they were repaired, and the cache is marked as unfinished. Raises UserError with the keys of images that changed
    otherwise, and for `check` of a cache without image digests.
    """
    try:
        found = read_identity(path) if storage.exists(storage.join(path, IDENTITY)) else identity
    except DamagedFileError:  # `Stage.begin` reports it
        return identity
    if {name for name in {*found, *identity} if found.get(name) != identity.get(name)} - {TRAIN_LISTING}:
        return identity  # `Stage.begin` reports the differing settings
    before, rows = kept_listing(storage.join(path, LISTING)), listing.train()
    if before is None:
        if not check or found != identity:
            return identity
        before = listing
    former = before.train()
    if not _alike(before, listing, former, rows):
        if found_changes := changes(before, listing, former, rows):
            raise refusal(path, "cache.path", images.source, found_changes)
        return identity
    other_size = _other_size(former, rows)
    by_content = _in_parquet(rows) if other_size.any() else other_size  # in Parquet files the size is that of a row group
    other_version, known = touched(former, rows)
    suspects = np.ones(len(rows), bool) if check else (other_version | other_size) & (by_content | ~other_size)
    if not known and not check:
        stage.say(
            f"{path} was written by a version of mar-ray that did not record modification times: images replaced by others of the same "
            f"size are not detected; {ENCODE_AGAIN}"
        )
    compared = _compared(images, path, rows, shards, suspects.nonzero()[0], check, stage)
    changed = {*(other_size & ~by_content).nonzero()[0].tolist(), *compared.changed, *(row for row in compared.unknown if other_size[row])}
    refused = sorted(changed - _rejected_rows(path, shards, changed))
    if refused:
        keys = rows.table.column("key").take(refused).to_pylist()
        raise refusal(path, "cache.path", images.source, Changes([], [], keys))
    if changed:
        stage.say(f"images that were rejected in {path} have been repaired; their shards are encoded again")
        storage.write_json(storage.join(path, IDENTITY), identity)
        for name in ("summary.json", MANIFEST):
            storage.delete(storage.join(path, name))
        return identity
    if suspects.any() and known and not compared.unknown:
        keep_listing(storage.join(path, LISTING), listing)  # so that the next run does not read them again
    return {**identity, TRAIN_LISTING: found.get(TRAIN_LISTING, identity[TRAIN_LISTING])}


def _compared(
    images: ImageSettings, path: str, rows: ImageRows, shards: dict[int, Shard], places: np.ndarray, check: bool, stage: Stage
) -> Compared:
    if not len(places):
        return Compared()
    if not check:
        stage.say(f"{len(places):,} of {len(rows):,} images are in files that were written after {path} was made; reading them again")
    with stage.progress(len(places)) as bar:
        compared = compare_images(images, path, rows, shards, places, bar.update)
    count = len(compared.unknown)
    if count and check:
        raise UserError(f"{path} has no digests of {count:,} images: an earlier version of mar-ray wrote it", remedy=ENCODE_AGAIN)
    if count:
        stage.say(f"{path} has no digests of {count:,} images, so that changes of their bytes are not detected; {ENCODE_AGAIN}")
    if compared.equal:
        stage.say(f"{compared.equal:,} of {len(places):,} images that were read again are unchanged")
    return compared


def _alike(before: ImageListing, now: ImageListing, former: ImageRows, rows: ImageRows) -> bool:
    """Whether both listings have the same keys with the same classes."""
    if before.class_names != now.class_names or len(former) != len(rows):
        return False
    return all(former.table.column(name).equals(rows.table.column(name)) for name in ("key", "label"))


def _other_size(former: ImageRows, rows: ImageRows) -> np.ndarray:
    sizes = former.column("size"), rows.column("size")
    found: np.ndarray = (sizes[0] != sizes[1]) & (sizes[0] >= 0)
    return found


def _in_parquet(rows: ImageRows) -> np.ndarray:
    """Mask of the rows in Parquet files."""
    return np.array([(file or "").endswith(".parquet") for file in rows.column("file")], bool)


def _rejected_rows(path: str, shards: dict[int, Shard], among: set[int]) -> set[int]:
    """The rows in `among` that finished shards rejected."""
    found = set[int]()
    for shard in shards.values():
        if any(shard.start <= row < shard.stop for row in among):
            record = read_record(storage.join(path, SHARDS, shard.record)) or {"rejected": []}
            found |= {shard.start + image["row"] for image in record["rejected"]}
    return found
