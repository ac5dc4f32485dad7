"""`metrics.jsonl` of a training run: one JSON object per interval, with null for non-finite numbers."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.checkpoints.directory import MetricsRow
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError
from pipelines.runtime.records import damaged, nan_for_null, null_for_nan, parsed

logger = logging.getLogger(__name__)

CHECKPOINTED = 100  # number of latest rows stored in each checkpoint
OBJECT_SECONDS = 30.0  # interval of writes to a bucket, where the whole object is written again


class MetricsLog:
    """`metrics.jsonl` of a run that resumes at `images_seen`: later rows are dropped, because their steps are repeated.

    `checkpointed`: the latest rows, as stored in the checkpoint. If the driver was killed before it wrote them, they are `recovered`.
    """

    def __init__(
        self, path: str, images_seen: int, checkpointed: Sequence[dict[str, Any]] = (), say: Callable[[str], None] = logger.warning
    ) -> None:
        """`say` prints a message, once, when the file cannot be written during training; each new row tries again. Unreadable rows are
        dropped, which is logged with their number."""
        self.path, self._say, self._reported = path, say, False
        written, damage = read_metrics(path) if storage.exists(path) else ([], None)
        if damage is not None:
            say(str(damage))
        lines = [*written, *map(nan_for_null, checkpointed)]
        kept = {row["images_seen"]: row for row in lines if row["images_seen"] <= images_seen}
        self.rows: list[dict[str, Any]] = [kept[position] for position in sorted(kept)]
        positions = {row["images_seen"] for row in written}
        self.recovered = [row for row in self.rows if row["images_seen"] not in positions]
        self._on_disk = -1  # number of rows in the file; −1: unknown or other rows
        self._written = float("-inf")
        if self.recovered or len(self.rows) < len(written) or damage is not None:
            self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row. If a restarted worker group repeats a row, it replaces the former row and all later ones."""
        while self.rows and self.rows[-1]["images_seen"] >= row["images_seen"]:
            self.rows.pop()
            self._on_disk = -1
        self.rows.append(row)
        try:
            self._keep(row)
            self._reported = False
        except OSError as error:
            self._on_disk = -1
            if not self._reported:
                self._reported = True
                self._say(f"{self.path} can't be written, retrying with every row: {error.__cause__ or error}")

    def _keep(self, row: dict[str, Any]) -> None:
        if storage.is_local(self.path) and self._on_disk == len(self.rows) - 1:
            with open(storage.filesystem(self.path)[1], "ab") as stream:
                stream.write(_line(row))
            self._on_disk += 1
        elif storage.is_local(self.path) or time.monotonic() - self._written >= OBJECT_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the whole file if it does not contain all rows. Raises storage.UnwritableError."""
        if self._on_disk != len(self.rows):
            storage.write_bytes(self.path, b"".join(_line(row) for row in self.rows))
            self._on_disk, self._written = len(self.rows), time.monotonic()


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(null_for_nan(row), allow_nan=False) + "\n").encode()


def read_metrics(path: str) -> tuple[list[dict[str, Any]], DamagedFileError | None]:
    """The rows of a file, with NaN for null, without unreadable rows; and an error about the first unreadable row with the number of such
    rows, or None.

    A partial row at the end, left by a killed writer, does not count as damage.
    """
    *lines, last = storage.read_bytes(path).split(b"\n")
    rows, errors = list[dict[str, Any]](), list[DamagedFileError]()
    for number, line in enumerate([*lines, last] if last[:1] not in (b"", b"{") else lines, start=1):
        try:
            rows.append(nan_for_null(parsed(line, f"line {number}", MetricsRow, "")))
        except DamagedFileError as error:
            errors.append(error)
    if errors:
        return rows, damaged(path, errors[0], f"{len(errors)} of {len(errors) + len(rows)} lines are left out")
    return rows, None
