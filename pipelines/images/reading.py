"""Reading images of a source: the encoded bytes of an image, and pixels by index, decoded by threads and cached if they fit in memory."""

import errno
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.images.pixels import decode
from pipelines.images.settings import ImageSettings
from pipelines.images.sources import places
from pipelines.images.sources.table import ImageRow
from pipelines.runtime import s3, storage
from pipelines.runtime.errors import ImageError, UserError

UNANSWERED = {  # errors of the file system or this process, not of one file; for S3 see `s3.refused`
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
}  # fmt: skip

MEMORY_LIMIT = 2 * 2**30  # bytes of decoded pixels cached per process
DECODERS = 8  # threads: Pillow and file reads release the GIL


class Decoded(NamedTuple):
    """One image: uint8 (size, size, 3), or None and the reason; and the SHA-256 of its bytes ("" if they cannot be read)."""

    pixels: np.ndarray | None
    reason: str
    digest: str


class DecodedImages:
    """The images of `rows`. An unusable image is replaced by the next usable image and its label; `rejected` maps the index in `rows` to
    the reason."""

    def __init__(self, settings: ImageSettings, rows: Sequence[ImageRow], memory_limit: int = MEMORY_LIMIT) -> None:
        self.settings, self.rows = settings, rows
        self.rejected: dict[int, str] = {}
        shape = (len(rows), settings.size, settings.size, 3)
        self._kept = np.zeros(shape, np.uint8) if np.prod(shape) <= memory_limit else None
        self._decoded = np.zeros(len(rows), bool)
        self._labels = np.full(len(rows), -1, np.int64)
        self._threads = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices (n,) → uint8 (n, size, size, 3) and labels int64 (n,).

        Raises UserError when the share of unusable images exceeds `images.max_rejected`.
        """
        if self._kept is None:
            pixels, labels = zip(*self._threads.map(self._decode, indices.tolist()), strict=True)
            return np.stack(pixels), np.array(labels)
        new = np.unique(indices[~self._decoded[indices]])
        for index, (image, label) in zip(new, self._threads.map(self._decode, new.tolist()), strict=True):
            self._kept[index], self._labels[index] = image, label
        self._decoded[new] = True
        return self._kept[indices], self._labels[indices]

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        while True:
            if index not in self.rejected:
                row = self.rows[index]
                decoded = decode_row(self.settings, row)
                if decoded.pixels is not None:
                    return decoded.pixels, row.label
                self._reject(index, row, decoded.reason)
            index = (index + 1) % len(self.rows)

    def _reject(self, index: int, row: ImageRow, reason: str) -> None:
        self.rejected[index] = reason
        found, total = len(self.rejected), len(self.rows)
        if found > self.settings.max_rejected * total or found == total:
            raise UserError(
                f"{found} of {total} images can't be used, but images.max_rejected={self.settings.max_rejected} allows "
                f"{int(self.settings.max_rejected * total)}; the last is {row.key} ({reason})",
                remedy="repair them or raise images.max_rejected",
            )


def decode_row(images: ImageSettings, row: ImageRow) -> Decoded:
    """Read, decode and crop one image. Raises UserError when the source does not answer."""
    data, digest = read_with_digest(images, row)
    try:
        if row.reason:
            raise ImageError(row.reason)
        if isinstance(data, ImageError):
            raise data
        return Decoded(decode(data, images.size, images.exif), "", digest)
    except ImageError as error:
        return Decoded(None, str(error), digest)


def read_with_digest(images: ImageSettings, row: ImageRow) -> tuple[bytes | ImageError, str]:
    """The encoded bytes of one image and their SHA-256; if they cannot be read, the ImageError and "". Raises UserError when the source
    does not answer."""
    try:
        data = _read_bytes(images, row)
    except ImageError as error:
        return error, ""
    return data, storage.digest(data)


def read_image(settings: ImageSettings, row: ImageRow) -> bytes:
    """The encoded bytes of one image. Raises ImageError if they are missing or the listing rejects the image, and UserError if the source
    itself does not answer."""
    if row.reason:
        raise ImageError(row.reason)
    return _read_bytes(settings, row)


def _read_bytes(settings: ImageSettings, row: ImageRow) -> bytes:
    """As `read_image`, but also for images that the listing rejects."""
    try:
        return places.read(settings.source, row)
    except (OSError, pa.ArrowException) as error:
        if not (s3.refused(error) or (isinstance(error, OSError) and error.errno in UNANSWERED)):
            raise ImageError(f"can't be read: {type(error).__name__}") from error
        raise UserError(
            f"images.source {settings.source!r} can't be read ({row.key}: {error})",
            remedy="run the same command when it answers again: finished work is kept",
        ) from error
