"""A tree of folders, one a class, as torchvision's ImageFolder and ILSVRC lay images out."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs

from pipelines import s3, storage
from pipelines.sources.table import Listed, listed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
READS_AT_ONCE = 8  # folders listed at a time

Files = list[tuple[str, int, int]]  # paths relative to the source, their sizes in bytes, and their versions (`storage.size_and_version`)


def list_files(root: str) -> Files:
    """Every file below `root` but hidden ones, in any order."""
    system, inner = storage.filesystem(root)
    if not isinstance(system, fs.LocalFileSystem):
        found = s3.list_objects(root) if root.startswith("s3://") else _infos(system, inner)
        return [one for one in found if not any(name.startswith(".") for name in one[0].split("/"))]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found, folders = list(_folder(inner, "")), list[str]()
        folders = [name for name, size, _ in found if size < 0]
        below = pool.map(lambda folder: list(_walk(inner, folder)), folders)
        return [one for one in found if one[1] >= 0] + [one for each in below for one in each]


def _infos(system: fs.FileSystem, inner: str) -> Files:
    infos = system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    return [(one.path[len(inner) :].lstrip("/"), one.size, one.mtime_ns) for one in infos if one.type == fs.FileType.File]


def _walk(root: str, folder: str) -> Iterator[tuple[str, int, int]]:
    for one in _folder(root, folder):
        if one[1] < 0:
            yield from _walk(root, one[0])
        else:
            yield one


def _folder(root: str, folder: str) -> Iterator[tuple[str, int, int]]:
    """Files of one folder, their sizes and versions, and folders in it with the size −1."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                yield name, -1, -1
            elif entry.is_file():
                stat = entry.stat()
                yield name, stat.st_size, stat.st_mtime_ns
            elif entry.is_symlink():
                yield name, 0, -1  # leads nowhere: rejected when it is read


def list_imagefolder(files: Files, parts: bool) -> Listed:
    """Images of `class/…/image`, with `parts` of `part/class/…/image`; the classes are the sorted names of all class folders.

    An image whose name is not UTF-8 is listed with its bytes escaped, and with that as the reason.
    """
    depth = 3 if parts else 2  # components of the shortest key
    images = [(path.split("/"), size, version) for path, size, version in files if path.lower().endswith(SUFFIXES)]
    images = [one for one in images if len(one[0]) >= depth]
    names = {one: one.encode("utf-8", "backslashreplace").decode() for one in {path[depth - 2] for path, *_ in images}}
    class_names = sorted(names.values())
    numbers = {name: number for number, name in enumerate(class_names)}
    keys, reasons = list[str](), list[str | None]()
    for path, *_ in images:
        key = "/".join(path)
        escaped = os.fsencode(key).decode("utf-8", "backslashreplace") if not key.isascii() else key
        keys.append(escaped)
        reasons.append(None if escaped == key else "its name is not UTF-8")
    table = listed(
        keys=keys,
        labels=[numbers[names[path[depth - 2]]] for path, *_ in images],
        files=[None] * len(images),
        offsets=[-1] * len(images),
        sizes=[size for _, size, _ in images],
        reasons=reasons,
        versions=[version for *_, version in images],
    )
    return Listed(table, class_names)
