"""The lines a training run leaves behind: `metrics.jsonl`, one JSON object an interval; null where a number is not finite."""

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

CHECKPOINTED = 100  # newest lines that travel inside each checkpoint
OBJECT_SECONDS = 30.0  # between writes to a bucket, where a line can't be appended: the whole object is written


class MetricsLog:
    """`metrics.jsonl` of a run that goes on from `images_seen`: lines after that are dropped, for their steps are done again.

    `checkpointed`: the newest lines as the checkpoint holds them; a kill can come before the driver has written them, and they
    are `recovered` then.
    """

    def __init__(
        self, path: str, images_seen: int, checkpointed: Sequence[dict[str, Any]] = (), say: Callable[[str], None] = logger.warning
    ) -> None:
        """`say` is told, once, when the file can't be written while rows come in; each new row tries again. Lines that can't be read are
        dropped, which is logged with their number."""
        self.path, self._say, self._told = path, say, False
        written, damage = read_metrics(path) if storage.exists(path) else ([], None)
        if damage is not None:
            say(str(damage))
        lines = [*written, *map(nan_for_null, checkpointed)]
        known = {row["images_seen"]: row for row in lines if row["images_seen"] <= images_seen}
        self.rows: list[dict[str, Any]] = [known[one] for one in sorted(known)]
        there = {row["images_seen"] for row in written}
        self.recovered = [row for row in self.rows if row["images_seen"] not in there]
        self._on_disk = -1  # rows that the file is known to hold, and nothing else
        self._written = float("-inf")
        if self.recovered or len(self.rows) < len(written) or damage is not None:
            self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Take in a row; one that a restarted worker group repeats replaces that of the lost one, and those after it."""
        while self.rows and self.rows[-1]["images_seen"] >= row["images_seen"]:
            self.rows.pop()
            self._on_disk = -1
        self.rows.append(row)
        try:
            self._keep(row)
            self._told = False
        except OSError as error:
            self._on_disk = -1
            if not self._told:
                self._told = True
                self._say(f"{self.path} can't be written, which is tried again with every line: {error.__cause__ or error}")

    def _keep(self, row: dict[str, Any]) -> None:
        if storage.is_local(self.path) and self._on_disk == len(self.rows) - 1:
            with open(storage.filesystem(self.path)[1], "ab") as stream:
                stream.write(_line(row))
            self._on_disk += 1
        elif storage.is_local(self.path) or time.monotonic() - self._written >= OBJECT_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the whole file, if it does not hold all rows yet. Raises storage.UnwritableError where that is impossible."""
        if self._on_disk != len(self.rows):
            storage.write_bytes(self.path, b"".join(_line(row) for row in self.rows))
            self._on_disk, self._written = len(self.rows), time.monotonic()


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(null_for_nan(row), allow_nan=False) + "\n").encode()


def read_metrics(path: str) -> tuple[list[dict[str, Any]], DamagedFileError | None]:
    """The rows of a file, NaN where it says null, without those that can't be read; if there are such, what is wrong with the first and
    how many there are.

    A half line at the end was left by a writer that was killed: no damage.
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
