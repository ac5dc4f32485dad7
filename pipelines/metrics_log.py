"""The lines a training run leaves behind: `metrics.jsonl`, one JSON object an interval."""

import json
import time
from typing import Any

from pipelines import storage


class MetricsLog:
    """`metrics.jsonl`: one line an interval. A resumed run drops the lines after its checkpoint before it goes on."""

    WRITE_SECONDS = 5.0

    def __init__(self, path: str, images_seen: int) -> None:
        self.path = path
        lines = storage.read_bytes(path).decode().splitlines() if storage.exists(path) else []
        self.rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if row["images_seen"] <= images_seen]
        self._written = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Take in a row; rows that a restarted worker group repeats replace those of the lost one."""
        self.rows = [one for one in self.rows if one["images_seen"] < row["images_seen"]]
        self.rows.append(row)
        if time.monotonic() - self._written > self.WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        storage.write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self._written = time.monotonic()
