"""The members of a tar file by their headers alone: where each one's bytes lie, so that a member is read without unpacking."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pyarrow import fs

from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

BLOCK = 512
READ = 2 * BLOCK  # a header, and with it the whole of a small member such as a label

AHEAD = 2**20  # read with each request to S3, where one takes as long as a mebibyte: the headers of small members come along

ReadAt = Callable[[int, int], bytes]  # (offset, bytes) → the bytes there, fewer at the end of the file


class Member(NamedTuple):
    """One regular file in a tar, or a link to one. `start` holds its first bytes where they came with the header."""

    name: str
    offset: int
    size: int
    start: bytes
    link: str = ""  # what a hard or symbolic link leads to; empty for a file

    @property
    def reason(self) -> str | None:
        """Why the member can't be read, where it can't."""
        return f"is a link to {self.link}, which is not followed; store the file itself" if self.link else None


@contextmanager
def open_at(path: str) -> Iterator[ReadAt]:
    """Random reads of one file, local or on S3; usable from many threads."""
    system, inner = storage.filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        descriptor = os.open(inner, os.O_RDONLY)
        try:
            yield lambda offset, count: os.pread(descriptor, count, offset)
        finally:
            os.close(descriptor)
        return
    with system.open_input_file(inner) as stream:
        size, last = stream.size(), threading.local()

        def read_ahead(offset: int, count: int) -> bytes:
            start, data = getattr(last, "block", (0, b""))
            if not start <= offset <= offset + count <= start + len(data):
                start, data = offset, bytes(stream.read_at(min(max(count, AHEAD), size - offset), offset)) if offset < size else b""
                last.block = start, data
            return data[offset - start : offset - start + count]

        yield read_ahead


def members(path: str, read_at: ReadAt, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The regular files and links of the tar that begins at byte `start` of `path` (POSIX ustar and pax, GNU long names).

    Raises UserError where a header's checksum is wrong, and where the file ends without the end mark: it was cut off.
    """
    offset, name, link, size = start, "", "", -1  # name, link and size: what an extended header says of the next member
    while stop is None or offset < stop:
        block = read_at(offset, READ)
        header = block[:BLOCK]
        if len(header) < BLOCK:
            raise UserError(
                f"{path} is cut off: it ends before byte {offset + BLOCK:,}, without a tar's end mark", remedy="bring the file anew"
            )
        if not header.strip(b"\0"):
            return
        _check(path, offset, header)
        kind, data = header[156:157], offset + BLOCK
        found = _number(header[124:136])
        length = size if size >= 0 and kind not in b"xgLK" else found
        if kind in b"123456":  # links, devices and folders: no content follows, whatever their size
            length = 0
        if kind in (b"L", b"K", b"x"):
            content = read_at(data, found)
            if kind == b"L":
                name = _text(content)
            elif kind == b"K":
                link = _text(content)
            else:
                for field, value in _pax(content):
                    name = _text(value) if field == b"path" else name
                    link = _text(value) if field == b"linkpath" else link
                    size = int(value) if field == b"size" else size
        elif kind != b"g":
            if kind in (b"0", b"\0", b"7"):
                yield Member(name or _name(header), data, length, block[BLOCK : BLOCK + length])
            elif kind in (b"1", b"2"):
                yield Member(name or _name(header), data, 0, b"", link or _text(header[157:257]))
            name, link, size = "", "", -1
        offset = data + -(-length // BLOCK) * BLOCK


def _check(path: str, offset: int, header: bytes) -> None:
    try:
        right = int(header[148:156].strip(b"\0 ") or b"0", 8) == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    except ValueError:
        right = False
    if not right:
        raise UserError(f"{path} is no tar, or damaged: no valid header at byte {offset:,}", remedy="bring the file anew")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for files of 8 GiB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Records "length key=value\\n" of an extended header."""
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        record, content = content[: int(digits)], content[int(digits) :]
        field, _, value = record[len(digits) + 1 : -1].partition(b"=")
        yield field, value
