"""Changes of a source since an output was made from it: images that were added, removed or changed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.images.listing import ImageListing, keep_listing, kept_listing
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.stage import IDENTITY, Stage

LISTING = "listing.arrow"  # in an output: the listing of its images
SHOWN = 10  # keys in a message


@dataclass(frozen=True)
class Changes:
    """Keys of images that were added, that are missing, or that have another size, class, or part of the split."""

    added: list[str]
    missing: list[str]
    changed: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.missing or self.changed)

    def __str__(self) -> str:
        groups = {"changed": self.changed, "added": self.added, "missing": self.missing}
        return "; ".join(f"{len(keys):,} {change} ({_some(keys)})" for change, keys in groups.items() if keys)


def changes(before: ImageListing, now: ImageListing, rows_before: ImageRows, rows_now: ImageRows) -> Changes:
    """Differences between the rows of two listings; classes are compared by name."""
    old, new = _described(before, rows_before), _described(now, rows_now)
    return Changes(
        added=sorted(new.keys() - old.keys()),
        missing=sorted(old.keys() - new.keys()),
        changed=sorted(key for key in old.keys() & new.keys() if old[key] != new[key]),
    )


def touched(before: ImageRows, now: ImageRows) -> tuple[np.ndarray, bool]:
    """For two lists of the same keys: a mask of rows with a changed file version (their bytes may have changed although their size has
    not), and whether all versions were recorded before."""
    old, new = before.column("version"), now.column("version")
    known = before.table.column("version").null_count == 0
    return (old != new) & (old != -1), known


def refusal(path: str, setting: str, source: str, found: Changes) -> UserError:
    """The error for an output that was made from other images. `setting`: the setting with its path."""
    return UserError(
        f"{path} was made from other images than images.source {source!r} contains now: {found}",
        remedy=f"choose another {setting}, delete that directory to make it from these images, or restore the former images",
    )


def check_source(
    path: str, setting: str, source: str, listing: ImageListing, identity: dict[str, Any], stage: Stage, kept: str = ""
) -> None:
    """Compare the source with the images of the output at `path`, before `Stage.begin` compares its identity, which contains
    `images.listing`.

    `kept`: directory of the stored listing; default: `path`. Raises UserError with keys if only the images differ. Files that were written
    since with the same size are counted in a message: there are no digests here to compare their images.
    """
    before, identity_path = kept_listing(storage.join(kept or path, LISTING)), storage.join(path, IDENTITY)
    if before is None or not storage.exists(identity_path):
        return
    try:
        found = storage.read_json(identity_path, dict[str, Any])
    except DamagedFileError:  # `Stage.begin` reports or rewrites it
        return
    differing = {name for name in {*found, *identity} if found.get(name) != identity.get(name)}
    if differing == {"images.listing"} and (changed := changes(before, listing, before.rows, listing.rows)):
        raise refusal(path, setting, source, changed)
    if not differing and len(before.rows) == len(listing.rows):
        count = int(touched(before.rows, listing.rows)[0].sum())
        if count:
            stage.say(
                f"{count:,} of the {len(listing.rows):,} images of {source} are in files that were written after {path} was made from "
                "them, with unchanged sizes; whether their bytes have changed was not checked"
            )


def remember_source(path: str, listing: ImageListing) -> None:
    """Store the listing of the images that the output at `path` is made from, for `check_source`; an existing listing is kept."""
    if kept_listing(storage.join(path, LISTING)) is None:
        keep_listing(storage.join(path, LISTING), listing)


def _described(listing: ImageListing, rows: ImageRows) -> dict[str, tuple[str, int, bool]]:
    names = dict(enumerate(listing.class_names))
    labels = [names.get(label, str(label)) for label in rows.column("label").tolist()]
    described = zip(labels, rows.column("size").tolist(), rows.column("held_out").tolist(), strict=True)
    return dict(reversed(list(zip(rows.column("key"), described, strict=True))))  # of duplicate keys the first is used


def _some(keys: Iterable[str]) -> str:
    names = list(keys)
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
