"""What a source holds now beside what it held when an output was made of it: which images were added, are missing or have changed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.images.listing import ImageListing, keep_listing, kept_listing
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.stage import IDENTITY, Stage

LISTING = "listing.arrow"  # beside an output: what it was made of
SHOWN = 10  # keys in one message


@dataclass(frozen=True)
class Changes:
    """Keys of images that a source did not have before, has no more, or has otherwise: another size, class, or part of the split."""

    added: list[str]
    missing: list[str]
    changed: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.missing or self.changed)

    def __str__(self) -> str:
        found = {"changed": self.changed, "added": self.added, "missing": self.missing}
        return "; ".join(f"{len(keys):,} {what} ({_some(keys)})" for what, keys in found.items() if keys)


def changes(before: ImageListing, now: ImageListing, rows_before: ImageRows, rows_now: ImageRows) -> Changes:
    """How these rows of two listings differ by what the listings show; a class is compared by its name."""
    old, new = _described(before, rows_before), _described(now, rows_now)
    return Changes(
        added=sorted(new.keys() - old.keys()),
        missing=sorted(old.keys() - new.keys()),
        changed=sorted(key for key in old.keys() & new.keys() if old[key] != new[key]),
    )


def touched(before: ImageRows, now: ImageRows) -> tuple[np.ndarray, bool]:
    """Of two lists of the same keys, the rows whose file has another version: their bytes may have changed, where their size has not.
    And whether the version of every row was known before."""
    old, new = before.column("version"), now.column("version")
    known = before.table.column("version").null_count == 0
    return (old != new) & (old != -1), known


def refusal(path: str, setting: str, source: str, found: Changes) -> UserError:
    """Why an output that was made of other images is not continued. `setting`: the one that names its path."""
    return UserError(
        f"{path} was made of other images than images.source {source!r} holds now: {found}. Give another {setting}, delete that "
        "directory to make it of these images, or bring the former images back"
    )


def check_source(
    path: str, setting: str, source: str, listing: ImageListing, identity: dict[str, Any], stage: Stage, kept: str = ""
) -> None:
    """Look at the images of an output at `path` before `Stage.begin` compares its identity, of which `images.listing` is a part.

    `kept`: the directory of the listing that it was made of; empty: `path`. Raises UserError with keys where nothing differs but the
    images. Files that were written since, with as many bytes, are counted in a message: no digests of their images are kept here.
    """
    before, identity_path = kept_listing(storage.join(kept or path, LISTING)), storage.join(path, IDENTITY)
    if before is None or not storage.exists(identity_path):
        return
    try:
        found = storage.read_json(identity_path, dict[str, Any])
    except DamagedFileError:  # `Stage.begin` reports it, or writes it again
        return
    differing = {name for name in {*found, *identity} if found.get(name) != identity.get(name)}
    if differing == {"images.listing"} and (there := changes(before, listing, before.rows, listing.rows)):
        raise refusal(path, setting, source, there)
    if not differing and len(before.rows) == len(listing.rows):
        count = int(touched(before.rows, listing.rows)[0].sum())
        if count:
            stage.say(
                f"{count:,} of the {len(listing.rows):,} images of {source} lie in files that were written since {path} was made of "
                "them, and have the size that they had: whether their bytes have changed is not known here"
            )


def remember_source(path: str, listing: ImageListing) -> None:
    """Keep what the output at `path` is made of, for `check_source`; the first listing stays."""
    if kept_listing(storage.join(path, LISTING)) is None:
        keep_listing(storage.join(path, LISTING), listing)


def _described(listing: ImageListing, rows: ImageRows) -> dict[str, tuple[str, int, bool]]:
    names = dict(enumerate(listing.class_names))
    labels = [names.get(label, str(label)) for label in rows.column("label").tolist()]
    described = zip(labels, rows.column("size").tolist(), rows.column("held_out").tolist(), strict=True)
    return dict(reversed(list(zip(rows.column("key"), described, strict=True))))  # of a key that is there twice the first is used


def _some(keys: Iterable[str]) -> str:
    names = list(keys)
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
