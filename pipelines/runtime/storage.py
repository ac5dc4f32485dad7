"""File access of all stages, local or `s3://`, through pyarrow's file systems; writes are atomic."""

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

COPIES = "mar-copies-"  # prefix of a folder of local copies, followed by the PID of its process
PARTIAL = ".partial"  # suffix of a file or folder that is still being written


class UnwritableError(UserError, OSError):
    """A file could not be written: disk full, permission denied, bucket unreachable. `__cause__` is the original error."""


_lock = Lock()
_copies: tempfile.TemporaryDirectory[str] | None = None


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a path and the path in it. Relative local paths are relative to the working directory."""
    if path.startswith("s3://"):
        return s3.filesystem(path)
    if "://" in path:
        try:
            return fs.FileSystem.from_uri(path)
        except Exception as error:
            raise UserError(f"path {path!r} can't be opened: {error}; expected a local path or s3://bucket/prefix") from error
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def join(path: str, *parts: str) -> str:
    """`path/part/part…`, for local paths and URIs."""
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
    """Size of one file in bytes. Raises FileNotFoundError."""
    system, inner = filesystem(path)
    info = system.get_file_info(inner)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(path)
    return int(info.size)


def list_files(path: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Paths, relative to `path`, of all files below it, sorted. `suffixes` (lower case): only files with one of these endings."""
    system, inner = filesystem(path)
    selector = fs.FileSelector(inner, recursive=True, allow_not_found=True)
    files = [info.path[len(inner) :].lstrip("/") for info in system.get_file_info(selector) if info.type == fs.FileType.File]
    return sorted(name for name in files if not suffixes or name.lower().endswith(suffixes))


def list_directory(path: str) -> list[str]:
    """Names of the files and folders directly in `path`, sorted; empty if `path` does not exist."""
    system, inner = filesystem(path)
    return sorted(info.base_name for info in system.get_file_info(fs.FileSelector(inner, allow_not_found=True)))


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Convert an OSError of the body to an UnwritableError that names `path` and the reason."""
    try:
        yield
    except UnwritableError:
        raise
    except OSError as error:
        reason: object = error
        if is_local(path) and isinstance(error, FileExistsError):
            reason = "a file or a broken link has this name"
        raise UnwritableError(
            f"{path} can't be written: {reason}", remedy="fix that and run the same command (finished work is kept), or choose another path"
        ) from error


def make_directory(path: str) -> None:
    """Create the folder and its parents if they do not exist. Raises UnwritableError."""
    system, inner = filesystem(path)
    with writing(path):
        if isinstance(system, fs.LocalFileSystem):
            os.makedirs(inner, exist_ok=True)
        else:
            system.create_dir(inner, recursive=True)


def size_and_version(path: str) -> tuple[int, int]:
    """Size of one file in bytes, and a number that changes when it is written: the modification time in nanoseconds; on S3, 63 bits of the
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
        return Path(inner).read_bytes()  # 20 times as fast as Arrow's stream, which reads in chunks
    with system.open_input_stream(inner) as stream:
        return bytes(stream.read())


def read_range(path: str, offset: int, count: int) -> bytes:
    """`count` bytes from `offset`; fewer if the file ends earlier."""
    system, inner = filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        with open(inner, "rb", buffering=0) as stream:
            return os.pread(stream.fileno(), count, offset)
    with system.open_input_file(inner) as stream:
        return bytes(stream.read_at(min(count, max(stream.size() - offset, 0)), offset))


def write_bytes(path: str, data: bytes) -> None:
    """Write one file atomically (local: rename; S3: one object). Raises UnwritableError."""
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
    `remedy` if the content has another type."""
    return parsed(read_bytes(path), path, shape, remedy)


def write_json(path: str, value: Any) -> None:
    """Write JSON atomically; keys keep their order, so equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def delete(path: str) -> None:
    """Delete a file or a folder with its contents, if it exists."""
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
    """Move a finished local folder to `path`: by rename on a local disk; on S3 file by file, the file named `last` at the end, so that
    a folder without it is known to be incomplete. Raises UnwritableError."""
    system, inner = filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        with writing(path):
            os.makedirs(os.path.dirname(inner), exist_ok=True)
            staging = f"{inner}.{uuid.uuid4().hex[:8]}{PARTIAL}"
            shutil.move(local, staging)  # a copy if `local` is on another disk; the rename below makes it visible
            if os.path.isdir(inner):
                shutil.rmtree(inner)
            os.replace(staging, inner)
        return
    names = sorted((str(file.relative_to(local)) for file in local.rglob("*") if file.is_file()), key=lambda name: (name == last, name))
    for name in names:
        write_bytes(join(path, name), (local / name).read_bytes())


def delete_partial(path: str) -> None:
    """Remove unfinished files of killed writers in and next to the folder `path`. The stage that owns the folder calls this first."""
    if not is_local(path):
        s3.abort_uploads(path)
        return
    folder = Path(filesystem(path)[1])
    for unfinished in [*folder.rglob(f"*{PARTIAL}"), *folder.parent.glob(f"{folder.name}.*{PARTIAL}")]:
        delete(str(unfinished))


def local_directory(path: str) -> Path:
    """A local folder with the contents of `path`: `path` itself if it is local, else a copy, which is updated only if `path` has changed.

    Copies are removed when the process ends; copies of killed processes are removed when another process makes one.
    """
    if is_local(path):
        return Path(filesystem(path)[1])
    system, inner = filesystem(path)
    infos = [info for info in system.get_file_info(fs.FileSelector(inner, recursive=True)) if info.type == fs.FileType.File]
    version = digest(json.dumps([path, *([info.path, info.size, info.mtime_ns] for info in infos)]).encode())[:16]
    with _lock:
        target = _process_folder() / version
        if not target.exists():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for info in infos:
                name = info.path[len(inner) :].lstrip("/")
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(read_bytes(join(path, name)))
            partial.rename(target)
    return target


def _process_folder() -> Path:
    global _copies
    if _copies is None or not Path(_copies.name).name.startswith(f"{COPIES}{os.getpid()}-"):
        for folder in Path(tempfile.gettempdir()).glob(f"{COPIES}*-*"):
            process = folder.name.removeprefix(COPIES).partition("-")[0]
            if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc").exists():
                shutil.rmtree(folder, ignore_errors=True)
        _copies = tempfile.TemporaryDirectory(prefix=f"{COPIES}{os.getpid()}-", ignore_cleanup_errors=True)
    return Path(_copies.name)
