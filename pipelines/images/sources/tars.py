"""Members of a tar file, from its headers alone: the position of each member, so that it can be read without unpacking."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from pyarrow import fs

from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

ENCODING, UNDECODABLE = "utf-8", "backslashreplace"
AHEAD = 2**20  # bytes per request to S3: one request covers the headers of many small members
ANOTHER_COPY = "copy the file again from its source"


class Member(NamedTuple):
    """A regular file in a tar, or a link to one."""

    name: str
    offset: int
    size: int
    link: str = ""  # target of a hard or symbolic link; empty for a regular file

    @property
    def reason(self) -> str | None:
        """Why the member cannot be read; None if it can."""
        return f"is a link to {self.link}, which is not followed; store the file itself" if self.link else None


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading and seeking, local or on S3, where each request reads AHEAD bytes."""
    system, inner = storage.filesystem(path)
    if isinstance(system, fs.LocalFileSystem):
        with open(inner, "rb") as file:
            yield file
    else:
        with io.BufferedReader(system.open_input_file(inner), AHEAD) as file:
            yield file


def members(path: str, file: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The regular files and links of the tar in the bytes from `start` to `stop` of `path`, opened as `file`.

    Raises UserError if a header's checksum is wrong, and if the file ends without an end mark: it is truncated.
    """
    tar, offset = None, start
    while stop is None or offset < stop:
        file.seek(offset)
        try:
            if tar is None:  # `tarfile.open` raises the same error for a truncated file and for other files
                tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), ENCODING, UNDECODABLE)
                file.seek(offset)
                tar = tarfile.open(fileobj=file, mode="r:", encoding=ENCODING, errors=UNDECODABLE)  # noqa: SIM115  # `file` is the caller's
                member = tar.next()
            else:  # `tar.next` treats a damaged header as the end mark
                member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            end = offset + tarfile.BLOCKSIZE
            raise UserError(f"{path} is truncated: it ends before byte {end:,}, without a tar end mark", ANOTHER_COPY) from error
        except (tarfile.HeaderError, tarfile.ReadError) as error:
            raise UserError(f"{path} is not a tar, or damaged: no valid header at byte {offset:,}", ANOTHER_COPY) from error
        assert member is not None
        if member.isreg():
            yield Member(member.name, member.offset_data, member.size)
        elif member.islnk() or member.issym():
            yield Member(member.name, member.offset_data, 0, member.linkname)
        offset = tar.offset
