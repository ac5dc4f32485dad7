"""Published figures, which are shown only beside a run of the published size and setting."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluation.compared.records import Evaluation
from pipelines.evaluation.features.inception import INCEPTION_DIGEST

DATA = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """One row of a published table."""

    name: str
    model: str
    metrics: dict[str, float]
    source: str
    expected: dict[str, Any]  # of the record, as `describe` gives it


def published_rows() -> list[Published]:
    """All rows of `published.json`."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    found = []
    for row in data["rows"]:
        generation = {**data["generation"], **row["generation"]}
        expected = {**{f"generate.{name}": value for name, value in generation.items()}, "evaluate.images": data["images"]}
        found.append(Published(row["name"], row["model"], row["metrics"], data["source"], {**expected, "images seen": data["images_seen"]}))
    return found


def sizes() -> dict[str, dict[str, int]]:
    """The sizes of the published models, by name."""
    found: dict[str, dict[str, int]] = json.loads(DATA.read_text(encoding="utf-8"))["models"]
    return found


def published_model(one: Evaluation) -> str:
    """The published model whose sizes the evaluated model has; empty for another model, and if the record does not say."""
    model = one.record.get("model") or {}
    return next((name for name, size in sizes().items() if all(model.get(key) == value for key, value in size.items())), "")


def beside(one: Evaluation) -> tuple[Published | None, str]:
    """The published row of an evaluation's model and setting; if there are rows of its model, but not of its setting, what differs."""
    name = published_model(one)
    rows = [row for row in published_rows() if row.model == name]
    if not rows:
        return None, ""
    differing = [(row, _differences(one, row)) for row in rows]
    row, differences = min(differing, key=lambda pair: len(pair[1]))
    if differences:
        return None, f"published figures of {name} are left out: {'; '.join(differences)}"
    return row, ""


def _differences(one: Evaluation, row: Published) -> list[str]:
    generation = one.record.get("generation") or {}
    found = {f"generate.{name}": value for name, value in generation.items()} | {"evaluate.images": one.record["images"]}
    if one.images_seen is not None:  # unknown of an imported checkpoint
        found["images seen"] = one.images_seen
    wrong = [f"{name} is {found[name]}, published {value}" for name, value in row.expected.items() if found.get(name, value) != value]
    network, reference = one.record["network"], one.record["reference"]
    if network["name"] != "inception" or not str(network["digest"]).startswith(INCEPTION_DIGEST):
        wrong.append(f"the feature network is not the published Inception ({network['name']}, digest {str(network['digest'])[:8]})")
    if reference.get("kind") != "statistics" or reference.get("made_of"):
        wrong.append("the reference is not ADM's file")
    return wrong
