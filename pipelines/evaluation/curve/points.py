"""The curve's points: what the evaluations of a run's checkpoints measured."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.checkpoints.directory import PREFIX, images_of
from pipelines.evaluation.causes.memorisation import SHARE
from pipelines.evaluation.record import RECORD
from pipelines.runtime import storage
from pipelines.runtime.plots import metric_curves
from pipelines.runtime.records import nan_for_null
from pipelines.runtime.stage import SUMMARY

FORMAT_VERSION = 1
CURVE, PICTURE, DRAWING = "curve.json", "curve.png", "curve.svg"
REMEDY = "delete its folder and run the same command again: this checkpoint is evaluated again"


@dataclass(frozen=True)
class EvaluationOfCheckpoint:
    """What is read again of a checkpoint's `evaluation.json`."""

    metrics: dict[str, float | None]
    reference: dict[str, Any]
    network: dict[str, Any]
    standard_errors: dict[str, float | None] = field(default_factory=dict)


def finished_points(path: str) -> list[dict[str, Any]]:
    """{checkpoint, images_seen, metrics, standard_errors} of every finished evaluation in a folder `images-…` of `path`, by images seen;
    also of checkpoints that are no longer kept. Raises DamagedFileError."""
    found = []
    for name in storage.list_directory(path):
        record = storage.join(path, name, RECORD)
        if not name.startswith(PREFIX) or not storage.exists(record) or not storage.exists(storage.join(path, name, SUMMARY)):
            continue
        read = storage.read_json(record, EvaluationOfCheckpoint, REMEDY)
        metrics, errors = nan_for_null(read["metrics"]), nan_for_null(read.get("standard_errors", {}))
        memorisation = read.get("memorisation") or {}
        if memorisation.get("share") is not None:
            metrics[SHARE], errors[SHARE] = memorisation["share"], nan_for_null(memorisation)["standard_error"]
        found.append({"checkpoint": name, "images_seen": images_of(name), "metrics": metrics, "standard_errors": errors})
    return sorted(found, key=lambda point: point["images_seen"])


def shown_metrics(points: list[dict[str, Any]]) -> list[str]:
    """Names of the metrics that the curve shows, without the spreads over splits and subsets."""
    names = dict.fromkeys(name for point in points for name in point["metrics"])
    return [name for name in names if "_std" not in name]


def draw_curve(points: list[dict[str, Any]]) -> dict[str, bytes]:
    """The curve as files: name → bytes."""
    drawn = metric_curves(
        {
            name: [
                (point["images_seen"], point["metrics"][name], point["standard_errors"].get(name, float("nan")))
                for point in points
                if name in point["metrics"]
            ]
            for name in shown_metrics(points)
        }
    )
    return {PICTURE: drawn["png"], DRAWING: drawn["svg"]}
