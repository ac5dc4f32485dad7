"""The report's sections about evaluations: metrics, the curve over checkpoints, classes, and the nearest training images."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from jobs.report.figures import StageOutput
from jobs.report.pictures import Pictures
from jobs.report.reading import Reading

RECORD, CURVE = "evaluation.json", "curve.png"
ERROR = "_standard_error"  # ends the name of a metric's standard error in a summary
NEIGHBOURS_SHOWN = 12  # of the samples in the grid: those closest to a training image


@dataclass(frozen=True)
class ClassRow:
    """A class in `evaluation.json`."""

    label: int
    samples: int
    precision: float | None = None
    distance_of_means: float | None = None
    label_agreement: float | None = None


@dataclass(frozen=True)
class ByClass:
    """The classes in `evaluation.json`; without rows if they were left out."""

    best: list[ClassRow] | None = None
    worst: list[ClassRow] | None = None
    ranked_by: str = ""
    distance_of_means_to: str = ""
    classes: int = 0
    picture: str = ""
    file: str = ""


@dataclass(frozen=True)
class Neighbour:
    """A sample and its nearest training images."""

    sample: int
    label: int
    ratio: float | None
    keys: list[str]


@dataclass(frozen=True)
class Memorisation:
    """The comparison with training images; without a share if it was left out."""

    share: float | None = None
    standard_error: float | None = None
    reference: float | None = None
    copies: int = 0
    training_images: int = 0
    train_part: int = 0
    picture: str = ""
    nearest: list[Neighbour] | None = None


@dataclass(frozen=True)
class ReportedEvaluation:
    """The parts of `evaluation.json` that the page uses; records of earlier versions have none of them."""

    by_class: ByClass | None = None
    memorisation: Memorisation | None = None


def metrics(evaluations: Sequence[StageOutput]) -> list[dict[str, Any]]:
    """Rows {name, value, error, extrapolated} of the last evaluation, by its summary; none of an earlier version, which has no errors."""
    known = evaluations[-1].summary if evaluations else {}
    named = [name for name in known if f"{name}{ERROR}" in known or f"{name.replace('_std', '_mean')}{ERROR}" in known]
    return [
        {"name": name, "value": known[name], "error": known.get(f"{name}{ERROR}"), "extrapolated": known.get(f"{name}_extrapolated")}
        for name in named
    ]


def curve(stages: Sequence[StageOutput], pictures: Pictures, reading: Reading) -> dict[str, Any] | None:
    """The picture of the metrics over the checkpoints, and how many these are."""
    for one in stages:
        if (data := reading.picture(one.file(CURVE))) and (checkpoints := one.summary.get("checkpoints")):
            return {"picture": pictures.add("curve", data), "checkpoints": len(checkpoints)}
    return None


def causes(evaluations: Sequence[StageOutput], pictures: Pictures, reading: Reading) -> dict[str, Any]:
    """`classes` and `neighbours` of the last evaluation, each if its record and its picture are there."""
    if not evaluations:
        return {}
    last = evaluations[-1]
    record = reading.object(last.within(RECORD), ReportedEvaluation)
    return {
        "classes": _classes(record.get("by_class") or {}, last, pictures, reading),
        "neighbours": _neighbours(record.get("memorisation") or {}, last, pictures, reading),
    }


def _classes(found: dict[str, Any], one: StageOutput, pictures: Pictures, reading: Reading) -> dict[str, Any] | None:
    rows = [*found.get("best", ()), *found.get("worst", ())]
    strips = _strips("class", found, len(rows), one, pictures, reading)
    if not strips:
        return None
    values = [name for name in ("precision", "distance_of_means", "label_agreement") if any(row.get(name) is not None for row in rows)]
    shown = [{**row, "picture": strip} for row, strip in zip(rows, strips, strict=True)]
    return {**found, "values": values, "best": shown[: len(found["best"])], "worst": shown[len(found["best"]) :]}


def _neighbours(found: dict[str, Any], one: StageOutput, pictures: Pictures, reading: Reading) -> dict[str, Any] | None:
    rows = found.get("nearest") or []
    strips = _strips("neighbours", found, len(rows), one, pictures, reading)
    if not strips:
        return None
    shown = [{**row, "picture": strip} for row, strip in zip(rows[:NEIGHBOURS_SHOWN], strips, strict=False)]
    return {**found, "rows": shown, "samples": len(rows)}


def _strips(name: str, found: dict[str, Any], rows: int, one: StageOutput, pictures: Pictures, reading: Reading) -> list[str]:
    """The picture's rows, the first NEIGHBOURS_SHOWN; none if it is missing or damaged. All rows have the same height."""
    data = reading.picture(one.within_file(found["picture"])) if rows and found.get("picture") else None
    if not data:
        return []
    with Image.open(io.BytesIO(data)) as picture:
        height = picture.height // rows
        parts = [picture.crop((0, height * row, picture.width, height * (row + 1))) for row in range(min(rows, NEIGHBOURS_SHOWN))]
    return [pictures.add(f"{name}-{number}", _png(part)) for number, part in enumerate(parts, 1)]


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()
