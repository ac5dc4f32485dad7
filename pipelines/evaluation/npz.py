"""`.npz` files as ADM's suite and torch-fidelity exchange them, read and written in pieces: a member of 10 GB takes no memory."""

import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from pyarrow import fs

from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import damaged

LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name
READ_ERRORS = (ValueError, TypeError, AttributeError, OSError, EOFError, LookupError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class Member:
    """An array in an `.npz`: what its header says, and where its values begin (None: it is compressed)."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None


@contextmanager
def opened(path: str, remedy: str) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`. Raises DamagedFileError with the `remedy` for whatever goes wrong while it is read, FileNotFoundError."""
    try:
        with _open(path) as stream, zipfile.ZipFile(stream) as archive:
            yield archive
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise damaged(path, f"it can't be read as .npz: {error}", remedy) from error


def names(path: str, remedy: str) -> list[str]:
    """Names of the arrays in an `.npz`."""
    with opened(path, remedy) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read(path: str, wanted: tuple[str, ...], remedy: str) -> dict[str, np.ndarray]:
    """Those of the arrays that are there, whole; nothing is unpickled. Raises as `opened` does."""
    with opened(path, remedy) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist()}
        found = {}
        for name in wanted:
            if name in there:
                with archive.open(f"{name}.npy") as stream:
                    found[name] = np.lib.format.read_array(stream, allow_pickle=False)
        return found


def member(path: str, name: str, remedy: str) -> Member:
    """The header of one array, checked against the size of the file. Raises UserError for one that is missing, pickled, of a negative shape
    or in Fortran's order, and DamagedFileError for one that is cut off."""
    with opened(path, remedy) as archive:
        there = [one.removesuffix(".npy") for one in archive.namelist()]
        if name not in there:
            raise UserError(f"{path} holds the arrays {', '.join(there) or 'none'}, expected {name}", remedy=remedy)
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as stream:
            shape, fortran, dtype = _header(stream)
            begins = stream.tell()
        if dtype.hasobject:
            raise UserError(f"{name} in {path} is pickled, which could run code, expected numbers", remedy=remedy)
        if fortran or any(side < 0 for side in shape):
            found = "Fortran's order" if fortran else f"the shape {shape}"
            raise UserError(f"{name} in {path} has {found}, expected sides of 0 or more in C's order", remedy=remedy)
        size = math.prod(shape) * dtype.itemsize
        if info.file_size != begins + size:
            raise damaged(path, f"{name} has {info.file_size - begins:,} bytes, its shape {shape} needs {size:,}", remedy)
        if info.compress_type != zipfile.ZIP_STORED:
            return Member(path, name, shape, dtype, None)
        local = storage.read_range(path, info.header_offset, LOCAL_HEADER)
        skipped = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        offset = info.header_offset + LOCAL_HEADER + skipped + begins
    if storage.size(path) < offset + size:
        raise damaged(path, f"it ends before the last value of {name}", remedy)
    return Member(path, name, shape, dtype, offset)


class Rows:
    """Rows (the first axis) of one array: at random where it is stored as it is, else by decompressing up to them."""

    def __init__(self, found: Member, remedy: str) -> None:
        self.member, self.remedy = found, remedy
        self._bytes = math.prod(found.shape[1:]) * found.dtype.itemsize
        self._stream: IO[bytes] | None = None
        self._next = 0  # row that the stream stands at

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop − start, …). Raises DamagedFileError where the file ends before."""
        one = self.member
        wanted = (stop - start) * self._bytes
        data = (
            self._decompressed(start, wanted)
            if one.offset is None
            else storage.read_range(one.path, one.offset + start * self._bytes, wanted)
        )
        if len(data) < wanted:
            raise damaged(one.path, f"it ends before row {stop} of {one.name}", self.remedy)
        return np.frombuffer(data, one.dtype).reshape(stop - start, *one.shape[1:])

    def _decompressed(self, start: int, wanted: int) -> bytes:
        if self._stream is None or start < self._next:
            archive = zipfile.ZipFile(_open(self.member.path))  # open as long as rows are read
            self._stream = archive.open(f"{self.member.name}.npy")
            _header(self._stream)
            self._next = 0
        try:
            while self._next < start:
                step = min(start - self._next, max(1, 2**24 // max(1, self._bytes)))
                self._stream.read(step * self._bytes)
                self._next += step
            self._next += wanted // max(1, self._bytes)
            return self._stream.read(wanted)
        except READ_ERRORS as error:
            raise damaged(self.member.path, error, self.remedy) from error


class Writer:
    """An `.npz` that is being written: whole arrays, or one in pieces."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def array(self, name: str, value: Any) -> None:
        """One whole array."""
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, np.asanyarray(value), allow_pickle=False)

    def rows(self, name: str, shape: tuple[int, ...], dtype: Any, parts: Iterator[np.ndarray]) -> None:
        """An array whose rows come in pieces. Raises ValueError where they are not as many as `shape` says."""
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(stream, header)
            count = 0
            for part in parts:
                stream.write(np.ascontiguousarray(part, dtype).tobytes())
                count += len(part)
        if count != shape[0]:
            raise ValueError(f"{count} rows of {name}, expected {shape[0]}")


@contextmanager
def writing(path: str) -> Iterator[Writer]:
    """Write `path` so that it is there only when it is complete."""
    system, inner = storage.filesystem(path)
    with storage.writing(path):
        if not isinstance(system, fs.LocalFileSystem):
            with system.open_output_stream(inner) as stream, zipfile.ZipFile(stream, "w") as archive:
                yield Writer(archive)
            return
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        temporary = f"{inner}.{uuid.uuid4().hex[:8]}{storage.PARTIAL}"
        try:
            with open(temporary, "wb") as stream:
                with zipfile.ZipFile(stream, "w") as archive:
                    yield Writer(archive)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, inner)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def save(path: str, arrays: Mapping[str, Any]) -> None:
    """Write whole arrays."""
    with writing(path) as writer:
        for name, value in arrays.items():
            writer.array(name, value)


def _open(path: str) -> Any:
    system, inner = storage.filesystem(path)
    return open(inner, "rb") if isinstance(system, fs.LocalFileSystem) else system.open_input_file(inner)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return reader(stream)
