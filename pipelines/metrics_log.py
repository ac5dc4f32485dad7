"""The lines a training run leaves behind: `metrics.jsonl`, one JSON object an interval."""

import json
from collections.abc import Sequence
from typing import Any

from pipelines import storage

CHECKPOINTED = 100  # newest lines that travel inside each checkpoint


class MetricsLog:
    """`metrics.jsonl` of a run that goes on from `images_seen`: lines after that are dropped, for their steps are done again.

    `checkpointed`: the newest lines as the checkpoint holds them; a kill can come before the driver has written them, and they
    are `recovered` then.
    """

    def __init__(self, path: str, images_seen: int, checkpointed: Sequence[dict[str, Any]] = ()) -> None:
        self.path = path
        written = [json.loads(line) for line in storage.read_bytes(path).decode().splitlines()] if storage.exists(path) else []
        known = {row["images_seen"]: row for row in [*written, *checkpointed] if row["images_seen"] <= images_seen}
        self.rows: list[dict[str, Any]] = [known[one] for one in sorted(known)]
        there = {row["images_seen"] for row in written}
        self.recovered = [row for row in self.rows if row["images_seen"] not in there]
        if self.recovered or len(self.rows) < len(written):
            self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Take in a row; one that a restarted worker group repeats replaces that of the lost one."""
        self.rows = [one for one in self.rows if one["images_seen"] < row["images_seen"]]
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        storage.write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
