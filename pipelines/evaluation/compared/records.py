"""Finds and reads the evaluation record of a run, of this and of earlier versions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.checkpoints.directory import PREFIX
from pipelines.evaluation.record import FORMAT_VERSION, RECORD
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import nan_for_null

FOLDER = "evaluation"  # of a run, where `mar quickstart` and the presets evaluate
REMEDY = "run `mar evaluate` again: samples and features are kept"


@dataclass(frozen=True)
class EvaluationRecord:
    """What is read of `evaluation.json`; the fields with a default are missing in earlier versions or for given samples."""

    format_version: int
    images: int
    metrics: dict[str, float | None]
    reference: dict[str, Any]
    network: dict[str, Any]
    standard_errors: dict[str, float | None] = field(default_factory=dict)
    extrapolated: dict[str, float | None] = field(default_factory=dict)
    generation: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    caution: str = ""


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation."""

    name: str  # of the run, for the table
    path: str
    record: Mapping[str, Any]

    @property
    def images_seen(self) -> int | None:
        """By the checkpoint; None for given samples and imported checkpoints."""
        seen: int | None = (self.record.get("generation") or {}).get("images_seen")
        return seen

    def values(self, kind: str) -> dict[str, float]:
        """`metrics`, `standard_errors` or `extrapolated` by name; NaN where it is not finite."""
        return nan_for_null(self.record.get(kind) or {})

    @property
    def reference_ids(self) -> set[str]:
        """What identifies the reference: its content, and the images that it is made of, which earlier versions did not record. The content
        of statistics of the same images differs in the last digits between machines."""
        known = self.record["reference"]
        content = {name: value for name, value in known.items() if name not in ("images", "made_of")}
        return {json.dumps([known.get("images"), one], sort_keys=True) for one in (content, known.get("made_of")) if one}


def read_evaluations(runs: list[str]) -> list[Evaluation]:
    """The evaluation of each run: the record in the directory itself or in its folder `evaluation`, of a curve the newest checkpoint's.

    Raises UserError for a directory without an evaluation or with several, and DamagedFileError.
    """
    names = [run.rstrip("/").rpartition("/")[2] for run in runs]
    if len(set(names)) < len(names):
        names = runs
    return [_read(name, run.rstrip("/")) for name, run in zip(names, runs, strict=True)]


def find_record(run: str) -> str:
    """The directory of a run's evaluation. Raises UserError."""
    for folder in (run, storage.join(run, FOLDER)):
        if storage.exists(storage.join(folder, RECORD)):
            return folder
        checkpoints = [name for name in _evaluated(folder) if name.startswith(PREFIX)]
        if checkpoints:
            return storage.join(folder, max(checkpoints))
    found = _evaluated(run)
    if len(found) == 1:
        return storage.join(run, found[0])
    if found:
        raise UserError(f"{run!r} holds the evaluations {', '.join(found)}, expected one", remedy=f"name it, e.g. {run}/{found[0]}")
    raise UserError(f"{run!r} holds no evaluation: no {RECORD} there or in {FOLDER}/", remedy="run `mar evaluate`")


def _evaluated(folder: str) -> list[str]:
    """Names of the directories in `folder` that hold a record."""
    return [name for name in storage.list_directory(folder) if storage.exists(storage.join(folder, name, RECORD))]


def _read(name: str, run: str) -> Evaluation:
    folder = find_record(run)
    file = storage.join(folder, RECORD)
    record = storage.read_json(file, EvaluationRecord, REMEDY)
    if record["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{file} has the format version {record['format_version']}, expected {FORMAT_VERSION} or less",
            remedy="use the version of mar that wrote it",
        )
    return Evaluation(name, folder, record)
