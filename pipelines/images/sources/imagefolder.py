"""A folder tree with one folder per class, as in torchvision's ImageFolder and ILSVRC."""

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
READS_AT_ONCE = 8  # folders listed in parallel

Files = list[tuple[str, int, int]]  # (path relative to the source, size in bytes, version), see `storage.size_and_version`
LOOP = "is a link that leads to one of its parent folders"

Identities = tuple[tuple[int, int], ...]  # device and inode of a folder and all its parents


def list_files(root: str) -> Files:
    """All files below `root` except hidden ones, in any order. Raises UserError for a local folder that cannot be listed, and for links
    that form a loop."""
    system, inner = storage.filesystem(root)
    if not isinstance(system, fs.LocalFileSystem):
        found = s3.list_objects(root) if root.startswith("s3://") else _infos(system, inner)
        return [file for file in found if not any(name.startswith(".") for name in file[0].split("/"))]
    try:
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            top = _entered(inner, "", ())
            found = list(_folder(inner, ""))
            folders = [name for name, size, _ in found if size < 0]
            below = pool.map(lambda folder: list(_walk(inner, folder, top)), folders)
            return [file for file in found if file[1] >= 0] + [file for files in below for file in files]
    except OSError as error:
        path = error.filename or root
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} {LOOP}", remedy="remove it") from error
        raise UserError(
            f"images.source: {path} can't be listed: {error.strerror or error}", remedy="make it readable and run again"
        ) from error


def _infos(system: fs.FileSystem, inner: str) -> Files:
    infos = system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    return [(info.path[len(inner) :].lstrip("/"), info.size, info.mtime_ns) for info in infos if info.type == fs.FileType.File]


def _walk(root: str, folder: str, above: Identities) -> Iterator[tuple[str, int, int]]:
    here = _entered(root, folder, above)
    for file in _folder(root, folder):
        if file[1] < 0:
            yield from _walk(root, file[0], here)
        else:
            yield file


def _entered(root: str, folder: str, above: Identities) -> Identities:
    """The identities of the folder and all its parents. Raises UserError if the folder is one of its own parents."""
    path = os.path.join(root, folder)
    found = os.stat(path)
    here = (found.st_dev, found.st_ino)
    if here in above:
        while folder and not os.path.islink(os.path.join(root, folder)):
            folder = os.path.dirname(folder)
        if folder:
            raise UserError(f"{os.path.join(root, folder)} {LOOP}", remedy="remove it")
        raise UserError(f"{path} is mounted inside itself", remedy="unmount it")
    return (*above, here)


def _folder(root: str, folder: str) -> Iterator[tuple[str, int, int]]:
    """Files of one folder with their sizes and versions, and its subfolders with size −1."""
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
                yield name, 0, -1  # a broken link: rejected when it is read


def list_imagefolder(files: Files, parts: bool, folders: list[str], hidden: list[str]) -> Listed:
    """Images of `class/…/image`, with `parts` of `part/class/…/image`. Classes are the sorted names of all class folders.

    `folders` and `hidden`: see `class_folders`. If the name of an image is not UTF-8, the key has the bytes escaped, and the image is
    rejected with that reason.
    """
    depth = 3 if parts else 2  # components of the shortest key
    by_name = [(path, path.lower().endswith(SUFFIXES)) for path, *_ in files]
    outside = [_escaped(path) for path, is_image in by_name if is_image and path.count("/") < depth - 1]
    others = [_escaped(path) for path, is_image in by_name if not is_image]
    images = [file for file in files if file[0].lower().endswith(SUFFIXES) and file[0].count("/") >= depth - 1]
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
    """The path with bytes that are not UTF-8 written as \\xff."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
