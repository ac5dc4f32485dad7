"""A tree of folders, one a class, as torchvision's ImageFolder and ILSVRC lay images out."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs

from pipelines.images.sources.class_folders import empty_classes, passed_over
from pipelines.images.sources.table import Listed, listed
from pipelines.runtime import s3, storage
from pipelines.runtime.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
READS_AT_ONCE = 8  # folders listed at a time

Files = list[tuple[str, int, int]]  # paths relative to the source, their sizes in bytes, and their versions (`storage.size_and_version`)
LOOP = "is a link that leads in a circle; remove it"

Identities = tuple[tuple[int, int], ...]  # device and inode of a folder and of all above it


def list_files(root: str) -> Files:
    """Every file below `root` but hidden ones, in any order. Raises UserError for a local folder that can't be listed, and for a loop
    of links."""
    system, inner = storage.filesystem(root)
    if not isinstance(system, fs.LocalFileSystem):
        found = s3.list_objects(root) if root.startswith("s3://") else _infos(system, inner)
        return [one for one in found if not any(name.startswith(".") for name in one[0].split("/"))]
    try:
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            top = _entered(inner, "", ())
            found = list(_folder(inner, ""))
            folders = [name for name, size, _ in found if size < 0]
            below = pool.map(lambda folder: list(_walk(inner, folder, top)), folders)
            return [one for one in found if one[1] >= 0] + [one for each in below for one in each]
    except OSError as error:
        path = error.filename or root
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} {LOOP}") from error
        raise UserError(
            f"images.source: {path} can't be listed: {error.strerror or error}", remedy="make it readable and run again"
        ) from error


def _infos(system: fs.FileSystem, inner: str) -> Files:
    infos = system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    return [(one.path[len(inner) :].lstrip("/"), one.size, one.mtime_ns) for one in infos if one.type == fs.FileType.File]


def _walk(root: str, folder: str, above: Identities) -> Iterator[tuple[str, int, int]]:
    here = _entered(root, folder, above)
    for one in _folder(root, folder):
        if one[1] < 0:
            yield from _walk(root, one[0], here)
        else:
            yield one


def _entered(root: str, folder: str, above: Identities) -> Identities:
    """The identities of the folder and of those above it. Raises UserError where it is one of those itself."""
    path = os.path.join(root, folder)
    found = os.stat(path)
    here = (found.st_dev, found.st_ino)
    if here in above:
        while folder and not os.path.islink(os.path.join(root, folder)):
            folder = os.path.dirname(folder)
        if folder:
            raise UserError(f"{os.path.join(root, folder)} {LOOP}")
        raise UserError(f"{path} is mounted inside itself", remedy="unmount it")
    return (*above, here)


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


def list_imagefolder(files: Files, parts: bool, folders: list[str], hidden: list[str]) -> Listed:
    """Images of `class/…/image`, with `parts` of `part/class/…/image`; the classes are the sorted names of all class folders.

    `folders` and `hidden`: what `class_folders` finds. An image whose name is not UTF-8 is listed with its bytes escaped, and with that
    as the reason.
    """
    depth = 3 if parts else 2  # components of the shortest key
    by_name = [(path, path.lower().endswith(SUFFIXES)) for path, *_ in files]
    outside = [_escaped(path) for path, is_image in by_name if is_image and path.count("/") < depth - 1]
    others = [_escaped(path) for path, is_image in by_name if not is_image]
    images = [one for one in files if one[0].lower().endswith(SUFFIXES) and one[0].count("/") >= depth - 1]
    names = [_escaped(path.split("/", depth)[depth - 2]) for path, *_ in images]
    empty = empty_classes([_escaped(folder) for folder in folders], set(names), others)
    class_names = sorted({*names, *empty})
    numbers = {name: number for number, name in enumerate(class_names)}
    keys = [_escaped(path) for path, *_ in images]
    table = listed(
        keys=keys,
        labels=[numbers[name] for name in names],
        files=[None] * len(images),
        offsets=[-1] * len(images),
        sizes=[size for _, size, _ in images],
        reasons=[None if key == path else "its name is not UTF-8" for key, (path, *_) in zip(keys, images, strict=True)],
        versions=[version for *_, version in images],
    )
    return Listed(table, class_names, empty, passed_over([_escaped(folder) for folder in hidden], outside, others))


def _escaped(path: str) -> str:
    """The path, with bytes that are not UTF-8 as \\xff."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
