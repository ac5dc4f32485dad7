"""Class folders of a tree: which folders are classes, which classes are empty, and which files are skipped."""

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Sequence

from pyarrow import fs

from pipelines.runtime import storage

NAMED = 3  # examples of each kind in a message


def class_folders(root: str, parts: bool) -> tuple[list[str], list[str]]:
    """Paths of the class folders below `root`, and of the hidden folders next to them; with `parts`, classes are `part/class`."""
    shown, hidden = _folders(root, "")
    if parts:
        below = [_folders(root, part) for part in shown]
        shown = [folder for folders, _ in below for folder in folders]
        hidden = hidden + [folder for _, folders in below for folder in folders]
    return shown, sorted(hidden)


def _folders(root: str, folder: str) -> tuple[list[str], list[str]]:
    system, inner = storage.filesystem(storage.join(root, folder) if folder else root)
    if isinstance(system, fs.LocalFileSystem):
        with os.scandir(inner) as entries:  # pyarrow fails on names that are not UTF-8
            names = sorted(entry.name for entry in entries if entry.is_dir())
    else:
        infos = system.get_file_info(fs.FileSelector(inner))
        names = sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)
    paths = [f"{folder}/{name}" if folder else name for name in names]
    return (
        [path for path, name in zip(paths, names, strict=True) if not name.startswith(".")],
        [path for path, name in zip(paths, names, strict=True) if name.startswith(".")],
    )


def empty_classes(folders: Sequence[str], with_images: set[str], others: Sequence[str]) -> dict[str, str]:
    """Names of the class folders without images in any part, with a description of their `others` (files that are not images)."""
    names = {folder.rpartition("/")[2] for folder in folders} - with_images
    held: dict[str, list[str]] = defaultdict(list)
    by_folder = {folder: folder.rpartition("/")[2] for folder in folders}
    for path in others:
        pieces = path.split("/")
        for depth in (1, 2):
            name = by_folder.get("/".join(pieces[:depth]))
            if name in names:
                held[name].append(path)
    return {name: _in_words(held[name]) for name in sorted(names)}


def _in_words(files: list[str]) -> str:
    return f"{counted(len(files), 'file')}, such as {min(files)}" if files else "no files"


def passed_over(hidden: Sequence[str], outside: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """A line about skipped files, or none: hidden folders, images outside the class folders, files that are not images."""
    endings = Counter(posixpath.splitext(path)[1].lower() or "none" for path in others)
    most = [f"{ending} {count}" for ending, count in endings.most_common(NAMED)]
    found = [
        f"{counted(len(hidden), 'hidden folder')} ({first(sorted(hidden), len(hidden))})" if hidden else "",
        f"{counted(len(outside), 'image')} outside the class folders ({first(sorted(outside), len(outside))})" if outside else "",
        f"{'1 file that is not an image' if len(others) == 1 else f'{len(others):,} files that are not images'}, by "
        f"extension ({first(most, len(endings))})" if others else "",
    ]  # fmt: skip
    return (f"skipped: {', '.join(text for text in found if text)}",) if any(found) else ()


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def first(names: Sequence[str], count: int) -> str:
    """The first few of `count` names, as text."""
    return ", ".join(names[:NAMED]) + (", …" if count > NAMED else "")
