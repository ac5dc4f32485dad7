"""Evaluations that can be compared, as a table of their metrics."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.evaluation.compared.published import Published, beside
from pipelines.evaluation.compared.records import Evaluation
from pipelines.runtime.errors import UserError

FORMAT_VERSION = 1
HOW = (  # settings of `generate` that do not decide what the samples are, or that every record has its own of
    "path", "checkpoint", "images", "labels", "samples", "image", "mask", "keep_pixels", "batch", "actors", "cuda_graph", "film",
    "compile", "images_seen",
)  # fmt: skip


def check_comparable(evaluations: Sequence[Evaluation]) -> None:
    """Raise UserError that names what differs: the feature network, the reference, or the number of samples."""
    first = evaluations[0]
    differing = {
        "feature network": any(one.record["network"] != first.record["network"] for one in evaluations),
        "reference": any(not one.reference_ids & first.reference_ids for one in evaluations),
        "number of samples": any(one.record["images"] != first.record["images"] for one in evaluations),
    }
    described: dict[str, Callable[[Evaluation], str]] = {
        "feature network": lambda one: f"{one.record['network']['name']} {str(one.record['network']['digest'])[:8]}",
        "reference": described_reference,
        "number of samples": lambda one: f"{one.record['images']:,}",
    }
    wrong = []
    for part in (part for part, differs in differing.items() if differs):
        wrong.append(f"{part} ({', '.join(f'{one.name}: {described[part](one)}' for one in evaluations)})")
    if wrong:
        raise UserError(
            f"these evaluations can't be compared, they differ in: {'; '.join(wrong)}",
            remedy="evaluate them with the same evaluate.features, evaluate.weights, evaluate.reference and evaluate.images",
        )


def described_reference(one: Evaluation) -> str:
    """A reference in a few words."""
    known = one.record["reference"]
    made_of = known.get("made_of") or known
    images = "" if known.get("images") is None else f"{known['images']:,} "
    size = f" of {made_of['size']} px" if "size" in made_of else ""
    return f"{images}{made_of.get('kind', 'images')}{size} {str(made_of.get('keys') or made_of.get('digest', ''))[:8]}".rstrip()


def compared(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The comparison as plain values: what is common, one entry for each evaluation, the published figures, and notes."""
    check_comparable(evaluations)
    rows: dict[str, Published] = {}
    notes: dict[str, list[str]] = {}  # text → names of the evaluations that it is about
    for one in evaluations:
        row, reason = beside(one)
        if row is not None:
            rows[row.name] = row
        for text in filter(None, (reason, one.record.get("caution"))):
            notes.setdefault(text, []).append(one.name)
    first = evaluations[0].record
    differing = differing_settings(evaluations)
    return {
        "format_version": FORMAT_VERSION,
        "network": first["network"],
        "reference": first["reference"],
        "images": first["images"],
        "evaluations": [
            {
                "name": one.name,
                "path": one.path,
                "images_seen": one.images_seen,
                "settings": {name: (one.record.get("generation") or {}).get(name) for name in differing},
                **{kind: one.values(kind) for kind in ("metrics", "standard_errors", "extrapolated")},
            }
            for one in evaluations
        ],
        "published": [{"name": row.name, "metrics": row.metrics, "source": row.source} for row in rows.values()],
        "notes": [f"{', '.join(names)}: {text}" for text, names in notes.items()],
    }


def differing_settings(evaluations: Sequence[Evaluation]) -> list[str]:
    """Names of the settings of `generate` in which the evaluations differ."""
    known = [one.record.get("generation") or {} for one in evaluations]
    names = dict.fromkeys(name for one in known for name in one if name not in HOW)
    return [name for name in names if len({json.dumps(one.get(name), sort_keys=True) for one in known}) > 1]


def metric_names(found: dict[str, Any]) -> list[str]:
    """The metrics of a comparison, in the order of the first evaluation that has them."""
    return list(dict.fromkeys(name for one in (*found["evaluations"], *found["published"]) for name in one["metrics"]))


def text_table(found: dict[str, Any]) -> str:
    """The comparison as aligned text: a column for each evaluation and each published row."""
    columns = [*found["evaluations"], *found["published"]]
    lines = [["", *(one["name"] for one in columns)]]
    lines.append(["images seen", *(_whole(one.get("images_seen")) for one in columns)])
    for name in found["evaluations"][0]["settings"]:
        lines.append([f"generate.{name}", *(_setting(one, name) for one in columns)])
    for name in metric_names(found):
        lines.append([name, *(_value(one, name) for one in columns)])
        if any(name in one.get("extrapolated", {}) for one in columns):
            extrapolated = [one.get("extrapolated", {}).get(name, math.nan) for one in columns]
            lines.append(["  of infinitely many samples", *(_number(value) for value in extrapolated)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns) + 1)]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(aligned)


def flat_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row for each evaluation and each published row, all with the same keys; what is not known is empty."""
    metrics = metric_names(found)
    rows = []
    for one in (*found["evaluations"], *found["published"]):
        row: dict[str, Any] = {"name": one["name"], "images": found["images"], "images_seen": one.get("images_seen")}
        row |= {f"generate.{name}": one.get("settings", {}).get(name) for name in found["evaluations"][0]["settings"]}
        for name in metrics:
            row[name] = one["metrics"].get(name)
            row[f"{name}_standard_error"] = one.get("standard_errors", {}).get(name)
        rows.append({**row, "source": one.get("source", one.get("path"))})
    return rows


def _value(one: dict[str, Any], name: str) -> str:
    if name not in one["metrics"]:
        return "–"
    error = one.get("standard_errors", {}).get(name, math.nan)
    return _number(one["metrics"][name]) + (f" ± {error:.2g}" if math.isfinite(error) else "")


def _setting(one: dict[str, Any], name: str) -> str:
    return str(one["settings"][name]) if "settings" in one else "–"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
