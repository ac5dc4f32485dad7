"""Progress of a stage: a live bar on a terminal, else a line every 15 seconds."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 15.0  # interval between lines without a terminal


_terminal: TextIO | None = None  # the original stderr while `output_in` redirects the process's output to a file


def console() -> Console:
    """The console for the user: stderr, so that a stage's result on stdout can be piped."""
    return Console(file=_terminal or sys.stderr, highlight=False, markup=False, emoji=False)


@contextmanager
def output_in(log: Path) -> Iterator[None]:
    """Redirect stdout and stderr of this process, C++ libraries included, to `log`; `console()` still prints to the terminal."""
    global _terminal
    log.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    originals = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    before, _terminal = _terminal, os.fdopen(os.dup(2), "w", buffering=1)
    try:
        with log.open("a") as stream:
            for descriptor in originals:
                os.dup2(stream.fileno(), descriptor)
            yield
    finally:
        _flush()
        for descriptor, original in originals.items():
            os.dup2(original, descriptor)
            os.close(original)
        _terminal.close()
        _terminal = before


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


class Bar:
    """Progress of one stage, counted in `unit`."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._first, self._start, self._last_line = done, time.monotonic(), time.monotonic()
        self._metrics: dict[str, float] = {}
        self._measured: float | None = None
        self._printed = done  # in the last line
        self._live = console().is_terminal
        self._rich: Progress | None = None

    def __enter__(self) -> "Bar":
        if self._live:
            self._rich = Progress(
                TextColumn("{task.description:>9}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=console(),
            )
            self._task = self._rich.add_task(self.name, total=self.total, completed=self.done, rate="", metrics="")
            self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self.done not in (self._first, self._printed):
            self._line()

    @property
    def rate(self) -> float:
        """Units per second since this bar was created."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def update(self, done: int, *, measured_rate: float | None = None, **metrics: float) -> None:
        """Set the total number of units done; `metrics` are shown beside the bar. `measured_rate`: units per second to show; by default
        the average since the bar was created."""
        self.done, self._measured = done, measured_rate
        self._metrics.update(metrics)
        if self._rich is not None:
            self._rich.update(self._task, completed=done, rate=f"{_rate(self._shown_rate)} {self.unit}/s", metrics=self._text())
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    @property
    def _shown_rate(self) -> float:
        return self.rate if self._measured is None else self._measured

    def _text(self) -> str:
        return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self._metrics.items())

    def _line(self) -> None:
        self._last_line, self._printed = time.monotonic(), self.done
        rate = self._shown_rate
        left = (self.total - self.done) / rate if rate else float("inf")
        share = 100 * self.done / max(self.total, 1)
        remaining = f", {left:.0f} s left" if self.done < self.total and left != float("inf") else ""
        console().print(
            f"{self.name}: {self.done:,} of {self.total:,} {self.unit} ({share:.0f} %), {_rate(rate)}/s{remaining}  {self._text()}",
            markup=False,
            soft_wrap=True,
        )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
