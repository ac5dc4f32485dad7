"""Reads a run's files for the report. Damaged files are left out, and listed on the page."""

import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError
from pipelines.runtime.records import damaged
from pipelines.runtime.stage import Summary
from pipelines.sweeping.table import Row
from pipelines.training.metrics.log import read_metrics

RUN_AGAIN = "run the command of that stage again: finished work is kept"


@dataclass(frozen=True)
class Best:
    """The best trial of a sweep."""

    trial: str
    parameters: dict[str, Any]
    metric: float


@dataclass(frozen=True)
class ReportedSummary(Summary):
    """The figures of a stage or a whole run that the page uses by name."""

    loss: float | None = None
    loss_curve: list[tuple[float, float]] | None = None
    images_per_second: float | None = None
    parameters: int | None = None
    psnr_held_out: float | None = None
    label_agreement: float | None = None
    accuracy_held_out: float | None = None
    rows: list[Row] | None = None
    best: Best | None = None
    classifier_accuracy_real: float | None = None
    samples: int | None = None
    sampling: dict[str, Any] | None = None
    newest: str | None = None
    checkpoints: list[str] | None = None
    peak_memory_gb: float | None = None


@dataclass(frozen=True)
class Classes:
    """The part of a cache's manifest that the page uses."""

    class_names: list[str]


@dataclass
class Reading:
    """Reads a run's files, and collects the problems of unreadable ones."""

    problems: list[str] = field(default_factory=list)

    def object(self, path: str, shape: Any = dict[str, Any], remedy: str = RUN_AGAIN) -> dict[str, Any]:
        """A JSON object of type `shape`; empty if the file is missing or damaged."""
        try:
            return dict(storage.read_json(path, shape, remedy)) if storage.exists(path) else {}
        except DamagedFileError as error:
            self._found(error)
            return {}

    def metrics(self, path: str | None, images_seen: int) -> list[dict[str, Any]]:
        """The readable rows of the `metrics.jsonl` of a run that ended at `images_seen`."""
        if path is None:
            return []
        rows, error = read_metrics(path)
        if error is None and (last := rows[-1]["images_seen"] if rows else 0) < images_seen:
            error = damaged(path, f"it ends at {last:,} images seen, the run at {images_seen:,}", "the training curves end there")
        if error is not None:
            self._found(error)
        return rows

    def picture(self, path: str | None) -> bytes | None:
        """The bytes of a picture; None if it is missing or damaged."""
        if path is None:
            return None
        data = storage.read_bytes(path)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                picture.verify()
        except Exception as error:  # whatever Pillow raises on arbitrary bytes
            self._found(damaged(path, str(error).split(" <_io.BytesIO")[0], "the picture is not shown"))
            return None
        return data

    def _found(self, error: DamagedFileError) -> None:
        if str(error) not in self.problems:
            self.problems.append(str(error))
