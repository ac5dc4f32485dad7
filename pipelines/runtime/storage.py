"""Every path of every stage, local or `s3://`, through pyarrow's file systems; writes are visible only when whole."""

import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from pyarrow import fs

from pipelines.runtime import s3
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import REMEDY, parsed

COPIES = "mar-copies-"  # begins the name of a folder of local copies; then the process that made it
PARTIAL = ".partial"  # ends the name of a file or folder that is still being written


class UnwritableError(UserError, OSError):
    """A file could not be written: the disk is full, the folder is somebody else's, the bucket is out of reach. Its cause says which."""


_lock = Lock()
_copies: tempfile.TemporaryDirectory[str] | None = None


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a path and the path inside it. Relative local paths are taken from the working directory."""
    if path.startswith("s3://"):
        return s3.filesystem(path)
    if "://" in path:
        try:
            return fs.FileSystem.from_uri(path)
        except Exception as error:
            raise UserError(f"path {path!r} can't be opened: {error}; expected a local path or s3://bucket/prefix") from error
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def join(path: str, *parts: str) -> str:
    """`path/part/part…`, for local paths and URIs alike."""
    return posixpath.join(str(path), *parts)


def parent(path: str) -> str:
    """The folder that holds `path`."""
    return path.rstrip("/").rpartition("/")[0] or "."


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def exists(path: str) -> bool:
    system, inner = filesystem(path)
    return system.get_file_info(inner).type != fs.FileType.NotFound


def is_directory(path: str) -> bool:
    system, inner = filesystem(path)
    return system.get_file_info(inner).type == fs.FileType.Directory


def size(path: str) -> int:
    """Bytes of one file; raises FileNotFoundError."""
    system, inner = filesystem(path)
    info = system.get_file_info(inner)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(path)
    return int(info.size)


def list_files(path: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Paths relative to `path` of all files below it, sorted; only those with one of the (lower-case) suffixes if given."""
    system, inner = filesystem(path)
    selector = fs.FileSelector(inner, recursive=True, allow_not_found=True)
    files = [info.path[len(inner) :].lstrip("/") for info in system.get_file_info(selector) if info.type == fs.FileType.File]
    return sorted(one for one in files if not suffixes or one.lower().endswith(suffixes))


def list_directory(path: str) -> list[str]:
    """Names (files and folders) directly below `path`, sorted; empty when it is not there."""
    system, inner = filesystem(path)
    return sorted(info.base_name for info in system.get_file_info(fs.FileSelector(inner, allow_not_found=True)))


@contextmanager
def writing(path: str) -> Iterator[None]:
    """An OSError of the body as UnwritableError that names `path` and the reason."""
    try:
        yield
    except UnwritableError:
        raise
    except OSError as error:
        reason: object = error
        if is_local(path) and isinstance(error, FileExistsError):
            reason = "a file, or a link that leads nowhere, is in its place"
        raise UnwritableError(
            f"{path} can't be written: {reason}; fix that and run the same command (what is finished is kept), or give another path"
        ) from error


def make_directory(path: str) -> None:
    """The folder and those above it, where they are not there yet. Raises UnwritableError."""
    system, inner = filesystem(path)
    with writing(path):
        if isinstance(system, fs.LocalFileSystem):
            os.makedirs(inner, exist_ok=True)
        else:
            system.create_dir(inner, recursive=True)


def size_and_version(path: str) -> tuple[int, int]:
    """Bytes of one file, and a number that changes when it is written: its time of modification in nanoseconds, on S3 63 bits of the
    SHA-256 of its ETag. Raises FileNotFoundError."""
    if path.startswith("s3://"):
        return s3.size_and_version(path)
    system, inner = filesystem(path)
    info = system.get_file_info(inner)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(path)
    return int(info.size), int(info.mtime_ns)


def read_bytes(path: str) -> bytes:
    system, inner = filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        return Path(inner).read_bytes()  # at once; Arrow's stream reads piece by piece, at a twentieth of the speed
    with system.open_input_stream(inner) as stream:
        return bytes(stream.read())


def read_range(path: str, offset: int, count: int) -> bytes:
    """`count` bytes from `offset` on; fewer where the file ends before."""
    system, inner = filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        with open(inner, "rb", buffering=0) as stream:
            return os.pread(stream.fileno(), count, offset)
    with system.open_input_file(inner) as stream:
        return bytes(stream.read_at(min(count, max(stream.size() - offset, 0)), offset))


def write_bytes(path: str, data: bytes) -> None:
    """Write one file so that it is there whole or not at all (rename on local disks, one object on S3). Raises UnwritableError."""
    system, inner = filesystem(path)
    with writing(path):
        if isinstance(system, fs.LocalFileSystem):
            _write_local(inner, data)
        else:
            s3.write(path, data)


def _write_local(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}{PARTIAL}"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_json(path: str, shape: Any = Any, remedy: str = REMEDY) -> Any:
    """The JSON value in a file, of the type `shape` (see `records.parsed`). Raises FileNotFoundError, and DamagedFileError with the
    `remedy` where the file holds something else."""
    return parsed(read_bytes(path), path, shape, remedy)


def write_json(path: str, value: Any) -> None:
    """Write JSON atomically; keys keep their order, so equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def delete(path: str) -> None:
    """Delete a file or a folder with all that is in it; nothing happens if it is not there."""
    system, inner = filesystem(path)
    kind = system.get_file_info(inner).type
    if kind == fs.FileType.Directory:
        system.delete_dir(inner)
    elif kind == fs.FileType.File:
        system.delete_file(inner)


def digest(data: bytes | memoryview) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def publish_directory(local: Path, path: str, last: str) -> None:
    """Move a finished local folder to `path`: by rename on a local disk; on S3 file by file with the file named `last` at the
    end, so that a folder without it is known to be unfinished. Raises UnwritableError."""
    system, inner = filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        with writing(path):
            os.makedirs(os.path.dirname(inner), exist_ok=True)
            staging = f"{inner}.{uuid.uuid4().hex[:8]}{PARTIAL}"
            shutil.move(local, staging)  # a copy when `local` is on another disk; the rename below is what makes it visible
            if os.path.isdir(inner):
                shutil.rmtree(inner)
            os.replace(staging, inner)
        return
    names = sorted((str(one.relative_to(local)) for one in local.rglob("*") if one.is_file()), key=lambda name: (name == last, name))
    for name in names:
        write_bytes(join(path, name), (local / name).read_bytes())


def delete_partial(path: str) -> None:
    """Remove what killed writers left unfinished in and beside the folder `path`; its owner calls this before it writes there."""
    if not is_local(path):
        s3.abort_uploads(path)
        return
    folder = Path(filesystem(path)[1])
    for left in [*folder.rglob(f"*{PARTIAL}"), *folder.parent.glob(f"{folder.name}.*{PARTIAL}")]:
        delete(str(left))


def local_directory(path: str) -> Path:
    """A local folder with the contents of `path`: itself on a local disk, else a copy, made anew only when `path` has changed.

    Copies are removed when the process ends, and those of killed processes when the next one makes a copy.
    """
    if is_local(path):
        return Path(filesystem(path)[1])
    system, inner = filesystem(path)
    infos = [one for one in system.get_file_info(fs.FileSelector(inner, recursive=True)) if one.type == fs.FileType.File]
    version = digest(json.dumps([path, *([one.path, one.size, one.mtime_ns] for one in infos)]).encode())[:16]
    with _lock:
        target = _process_folder() / version
        if not target.exists():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for one in infos:
                name = one.path[len(inner) :].lstrip("/")
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(read_bytes(join(path, name)))
            partial.rename(target)
    return target


def _process_folder() -> Path:
    global _copies
    if _copies is None or not Path(_copies.name).name.startswith(f"{COPIES}{os.getpid()}-"):
        for left in Path(tempfile.gettempdir()).glob(f"{COPIES}*-*"):
            process = left.name.removeprefix(COPIES).partition("-")[0]
            if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc").exists():
                shutil.rmtree(left, ignore_errors=True)
        _copies = tempfile.TemporaryDirectory(prefix=f"{COPIES}{os.getpid()}-", ignore_cleanup_errors=True)
    return Path(_copies.name)
