"""Metrics of each class: the share of its samples inside the reference, the distance of its mean, its label agreement."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.evaluation.reference_file import Reference
from pipelines.evaluation.scoring.class_sums import class_means
from pipelines.evaluation.scoring.feature_shards import KeptFeatures
from pipelines.evaluation.scoring.tasks import Tasks
from pipelines.runtime import storage
from pipelines.runtime.records import null_for_nan

FILE = "by_class.csv"
MOST_SHOWN = 4  # classes at each end
TO_CLASS, TO_WHOLE = "the reference's mean of the class", "the mean of the whole reference"
DEFINITIONS = {
    "precision": "share of the class's samples that lie in the ball of a reference image (of any class)",
    "distance_of_means": "unbiased estimate of ‖μ₁ − μ₂‖² of pooled features: less tr Σ/n of each mean; it can be negative",
    "label_agreement": "share of the class's samples that the classifier assigns to it",
}


@dataclass(frozen=True)
class ByClass:
    """One row for each class of the samples. Values that are not known are NaN."""

    labels: np.ndarray  # (C,) int64
    names: list[str]
    samples: np.ndarray  # (C,) int64
    values: dict[str, np.ndarray]  # precision, distance_of_means, label_agreement: (C,) each
    distance_to: str

    def ranked_by(self) -> str:
        """The value by which classes are best and worst; empty if there is none. The distance to the whole reference says how unusual a
        class is rather than how good its samples are, and comes last."""
        order = ["precision", "label_agreement"]
        place = 0 if self.distance_to == TO_CLASS else len(order)
        order.insert(place, "distance_of_means")
        return next((name for name in order if np.isfinite(self.values[name]).sum() > 1), "")

    def ranking(self) -> np.ndarray:
        """Rows from the best class to the worst, those without the value left out: (≤ C,)."""
        if not (name := self.ranked_by()):
            return np.empty(0, np.int64)
        values = self.values[name] if name == "distance_of_means" else -self.values[name]
        return np.argsort(values, kind="stable")[: int(np.isfinite(values).sum())]

    def ends(self) -> tuple[list[int], list[int]]:
        """Rows of the best classes, best first, and of the worst, worst first."""
        ranking = self.ranking().tolist()
        shown = min(MOST_SHOWN, len(ranking) // 2)
        return ranking[:shown], ranking[::-1][:shown]

    def row(self, number: int) -> dict[str, Any]:
        """One class as plain values."""
        values = {name: float(column[number]) for name, column in self.values.items()}
        return {
            "label": int(self.labels[number]),
            "class": self.names[number],
            "samples": int(self.samples[number]),
            **null_for_nan(values),
        }

    def save(self, path: str) -> None:
        """Write the table as CSV; values that are not known are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.row(0), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.row(number) for number in range(len(self.labels)))
        storage.write_bytes(path, text.getvalue().encode())

    def record(self) -> dict[str, Any]:
        """What the evaluation record says of the table."""
        best, worst = self.ends()
        return {
            "file": FILE,
            "classes": len(self.labels),
            "distance_of_means_to": self.distance_to,
            "ranked_by": self.ranked_by(),
            "best": [self.row(number) for number in best],
            "worst": [self.row(number) for number in worst],
            "definitions": DEFINITIONS,
        }


def by_class(kept: KeptFeatures, inside: np.ndarray | None, reference: Reference, class_names: Sequence[str], tasks: Tasks) -> ByClass:
    """The table of all classes that have samples. inside: (N,) bool, at each place whether the sample lies in a ball of the reference; None
    where that is not known. class_names: of the samples, by label; empty where they are not known. Raises ValueError for samples without
    labels."""
    numbers = kept.numbers()
    labels, predicted = numbers["label"], numbers["predicted"]
    if not len(labels) or labels.min() < 0:
        raise ValueError("the samples have no labels")
    present = np.unique(labels)
    classes = max(int(present[-1]) + 1, len(class_names))
    means = class_means(kept, kept.counts(), labels, classes, tasks)
    known = reference.classes
    if known is not None and list(class_names) == list(known[0]):
        distances, distance_to = means.distances(known[1]), TO_CLASS
    else:
        distances, distance_to = means.distances_to(reference.pooled[0]), TO_WHOLE
    agreeing = predicted == labels if (predicted >= 0).all() else None
    values = {
        "precision": _shares(inside, labels, present),
        "distance_of_means": distances[present],
        "label_agreement": _shares(agreeing, labels, present),
    }
    names = [class_names[label] if label < len(class_names) else str(label) for label in present.tolist()]
    return ByClass(present, names, means.counts[present], values, distance_to)


def _shares(flags: np.ndarray | None, labels: np.ndarray, present: np.ndarray) -> np.ndarray:
    if flags is None:
        return np.full(len(present), np.nan)
    found: np.ndarray = (np.bincount(labels, flags) / np.bincount(labels).clip(1))[present]
    return found
