"""Seconds and peak memory of a run over all its attempts, stored on disk so that killed attempts count too."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError


def memory_gb() -> float:
    """Memory of this process and all its descendants, in GB (10⁹ bytes): the sum of their proportional set sizes."""
    total = 0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except (OSError, psutil.Error):  # the process has ended, or is not readable
            continue
    return total / 1e9


@dataclass(frozen=True)
class Attempt:
    """One attempt in the file."""

    seconds: float
    peak_memory_gb: float


class Attempts:
    """A context manager that measures this attempt every `EVERY_SECONDS`; `path` is a local JSON file with a list of attempts."""

    EVERY_SECONDS = 5.0  # a measurement takes a tenth of a second with thirty processes

    def __init__(self, path: str, say: Callable[[str], None] = print) -> None:
        """`say` is called with one line if the file is damaged."""
        self.path = path
        self.earlier: list[dict[str, Any]] = []
        self.resumed = storage.exists(path)  # whether an earlier attempt did not finish
        if self.resumed:
            try:
                self.earlier = storage.read_json(path, list[Attempt], "seconds and memory of earlier attempts are not counted")
            except DamagedFileError as error:
                say(str(error))
        self._began = time.monotonic()
        self._peak = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="attempts", daemon=True)

    def __enter__(self) -> "Attempts":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._write()

    @property
    def seconds(self) -> float:
        """Seconds of all attempts."""
        return time.monotonic() - self._began + sum(one["seconds"] for one in self.earlier)

    @property
    def peak_memory_gb(self) -> float:
        """The highest memory measured in any attempt."""
        return max([self._peak, *(one["peak_memory_gb"] for one in self.earlier)])

    def _measure(self) -> None:
        while not self._ended.wait(self.EVERY_SECONDS):
            self._peak = max(self._peak, memory_gb())
            self._write()

    def _write(self) -> None:
        this = {"seconds": round(time.monotonic() - self._began, 1), "peak_memory_gb": round(self._peak, 3)}
        storage.write_json(self.path, [*self.earlier, this])
