"""Whether a source still holds the images that a cache was made of: by what the listings show and, where a file was written since, by
the SHA-256 of the image's bytes, which the records of the shards keep. A data set that was copied is the same source."""

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
ENCODE_AGAIN = "`mar verify --sample N` encodes some of them again"


def settle_identity(
    images: ImageSettings,
    path: str,
    listing: ImageListing,
    shards: dict[int, Shard],
    identity: dict[str, Any],
    stage: Stage,
    check: bool,
) -> dict[str, Any]:
    """The identity of the cache at `path`, or of the one that is to be made there, of the images that `listing` shows. `check`: read
    every image again, not only those whose file has another version.

    Images of the same bytes leave the identity as it was, wherever they lie now. Where all images that have changed are such that the
    cache had rejected, they were repaired: the cache is unfinished from here on. Raises UserError with the keys of those that have
    changed otherwise, and for a `check` of a cache that keeps no digests.
    """
    try:
        found = read_identity(path) if storage.exists(storage.join(path, IDENTITY)) else identity
    except DamagedFileError:  # `Stage.begin` reports it
        return identity
    if {name for name in {*found, *identity} if found.get(name) != identity.get(name)} - {TRAIN_LISTING}:
        return identity  # `Stage.begin` names the settings that differ
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
    by_content = _in_parquet(rows) if other_size.any() else other_size  # there the size is that of a row group
    other_version, known = touched(former, rows)
    suspects = np.ones(len(rows), bool) if check else (other_version | other_size) & (by_content | ~other_size)
    if not known and not check:
        stage.say(
            f"{path} was made by a version of mar-ray that kept no modification times: an image that was replaced since by one of the same "
            f"size is not noticed; {ENCODE_AGAIN}"
        )
    compared = _compared(images, path, rows, shards, suspects.nonzero()[0], check, stage)
    changed = {*(other_size & ~by_content).nonzero()[0].tolist(), *compared.changed, *(row for row in compared.unknown if other_size[row])}
    refused = sorted(changed - _rejected_rows(path, shards, changed))
    if refused:
        keys = rows.table.column("key").take(refused).to_pylist()
        raise refusal(path, "cache.path", images.source, Changes([], [], keys))
    if changed:
        stage.say(f"images that {path} had rejected were repaired; their shards are made again")
        storage.write_json(storage.join(path, IDENTITY), identity)
        for name in ("summary.json", MANIFEST):
            storage.delete(storage.join(path, name))
        return identity
    if suspects.any() and known and not compared.unknown:
        keep_listing(storage.join(path, LISTING), listing)  # so that they are not read again the next time
    return {**identity, TRAIN_LISTING: found.get(TRAIN_LISTING, identity[TRAIN_LISTING])}


def _compared(
    images: ImageSettings, path: str, rows: ImageRows, shards: dict[int, Shard], places: np.ndarray, check: bool, stage: Stage
) -> Compared:
    if not len(places):
        return Compared()
    if not check:
        stage.say(
            f"{len(places):,} of {len(rows):,} images lie in files that were written since {path} was made of them: they are read again"
        )
    with stage.progress(len(places)) as bar:
        compared = compare_images(images, path, rows, shards, places, bar.update)
    count = len(compared.unknown)
    if count and check:
        raise UserError(f"{path} keeps no digests of {count:,} images (an earlier version of mar-ray made it): {ENCODE_AGAIN}")
    if count:
        stage.say(f"of {count:,} images {path} keeps no digest: whether their bytes have changed is not known; {ENCODE_AGAIN}")
    if compared.equal:
        stage.say(f"{compared.equal:,} of {len(places):,} images read again have the bytes that {path} was made of")
    return compared


def _alike(before: ImageListing, now: ImageListing, former: ImageRows, rows: ImageRows) -> bool:
    """Whether both list the same keys in the same classes."""
    if before.class_names != now.class_names or len(former) != len(rows):
        return False
    return all(former.table.column(name).equals(rows.table.column(name)) for name in ("key", "label"))


def _other_size(former: ImageRows, rows: ImageRows) -> np.ndarray:
    sizes = former.column("size"), rows.column("size")
    found: np.ndarray = (sizes[0] != sizes[1]) & (sizes[0] >= 0)
    return found


def _in_parquet(rows: ImageRows) -> np.ndarray:
    """Which rows lie in a Parquet file."""
    return np.array([(file or "").endswith(".parquet") for file in rows.column("file")], bool)


def _rejected_rows(path: str, shards: dict[int, Shard], among: set[int]) -> set[int]:
    """Those of the rows that finished shards rejected."""
    found = set[int]()
    for shard in shards.values():
        if any(shard.start <= row < shard.stop for row in among):
            record = read_record(storage.join(path, SHARDS, shard.record)) or {"rejected": []}
            found |= {shard.start + one["row"] for one in record["rejected"]}
    return found
