"""WebDataset shards: tars in which the files of a sample share a name and differ in the extension."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import pyarrow as pa

from pipelines.images.sources.table import Listed, listed
from pipelines.images.sources.tars import Member, members, opened
from pipelines.runtime import storage

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json")
FIELDS = ("label", "cls")  # of a sample's JSON
READS_AT_ONCE = 16
LARGEST = 2**31  # labels in a listing are smaller


def list_webdataset(root: str, files: list[str]) -> Listed:
    """Samples of the tars `files` below `root`: keys `tar/sample`, labels from `sample.cls` or from `label` (or `cls`) of `sample.json`. A
    sample without exactly one image, or without an integer label, is listed with the reason."""
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        tables = list(pool.map(lambda file: _samples(root, file), files))
    return Listed(pa.concat_tables(tables).unify_dictionaries(), None)


def _samples(root: str, file: str) -> pa.Table:
    path = storage.join(root, file)
    found: list[tuple[str, int | None, int, int, str | None]] = []
    with opened(path) as opened_file:
        for name, sample in _grouped(members(path, opened_file)):
            images = [extension for extension in sample if extension.lower() in IMAGES]
            image = sample[images[0]] if len(images) == 1 else None
            label, reason = _label(sample, opened_file)
            if not images:
                reason = f"the sample has no image ({', '.join(IMAGES)}), only {', '.join(sample)}"
            elif image is None:
                reason = f"the sample has {len(images)} images ({', '.join(images)}), expected one"
            elif image.link:
                reason = f"{images[0]} {image.reason}"
            place = (image.offset, image.size) if image else (0, 0)
            found.append((f"{file.removesuffix('.tar')}/{name}", label, *place, reason))
    return listed(
        keys=[key for key, *_ in found],
        labels=[label for _, label, *_ in found],
        files=[file] * len(found),
        offsets=[offset for _, _, offset, _, _ in found],
        sizes=[size for *_, size, _ in found],
        reasons=[reason for *_, reason in found],
    )


def _grouped(found: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group consecutive members with the same name, up to the first dot of the file name, by extension."""
    name, sample = "", dict[str, Member]()
    for member in found:
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if file.startswith("."):
            continue
        if sample and (folder + slash + stem != name or extension in sample):
            yield name, sample
            sample = {}
        name = folder + slash + stem
        sample[extension] = member
    if sample:
        yield name, sample


def _label(sample: dict[str, Member], file: BinaryIO) -> tuple[int | None, str | None]:
    """The label, or None and the reason."""
    kind, names = next(((kind, found) for kind in LABELS if (found := [name for name in sample if name.lower() == kind])), ("", []))
    if not kind:
        return None, "no label (neither cls nor json)"
    member = sample[names[0]]
    if len(names) > 1:
        return None, f"the sample has {len(names)} labels ({', '.join(names)}), expected one"
    if member.link:
        return None, f"no label: {names[0]} {member.reason}"
    file.seek(member.offset)
    content = file.read(member.size)
    try:
        value = content.decode().strip() if kind == "cls" else _field(json.loads(content))
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()) or (isinstance(value, str) and "_" in value):
            raise ValueError
        label = int(value)
        return (label, None) if abs(label) < LARGEST else (None, f"label {label:.3g} is out of range")
    except (ValueError, TypeError, OverflowError):
        return None, f"no label: {kind} holds {content[:40].decode(errors='replace')!r}, expected a whole number"


def _field(record: object) -> int | float | str:
    found = next((record[name] for name in FIELDS if name in record), None) if isinstance(record, dict) else record
    if not isinstance(found, int | float | str):
        raise TypeError
    return found
