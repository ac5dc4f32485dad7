"""Means of kept features by class, from sums that tasks compute and merge."""

import itertools
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.metrics.class_means import ClassMeans
from pipelines.evaluation.scoring.feature_shards import KeptFeatures, pieces
from pipelines.evaluation.scoring.tasks import Tasks

GROUP = 8192  # images that one task sums


@dataclass
class _Sums:
    counts: np.ndarray  # (C,)
    totals: np.ndarray  # (C, D)
    squares: np.ndarray  # (C,): of Σ ‖x‖²


def class_means(kept: KeptFeatures, counts: np.ndarray, labels: np.ndarray, classes: int, tasks: Tasks) -> ClassMeans:
    """Of the images whose label is 0 or more. counts: images in each shard; labels: of each place, (N,), below `classes`."""
    bounds = [*range(0, int(counts.sum()), GROUP), int(counts.sum())]
    shared = tasks.share(labels)
    calls = [tasks.call(_group, kept, counts, bound, shared, classes) for bound in itertools.pairwise(bounds)]
    [sums] = tasks.results([tasks.merged(calls, _merged)])
    count = sums.counts
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums.totals / count[:, None]
        scatter = sums.squares - count * np.square(means).sum(axis=1)
        noise = np.where(count > 1, scatter.clip(0) / (count - 1) / count, np.nan)
    return ClassMeans(count, means, noise)


def _group(kept: KeptFeatures, counts: np.ndarray, bound: tuple[int, int], labels: np.ndarray, classes: int) -> _Sums:
    found: _Sums | None = None
    first = bound[0]
    for number, rows in pieces(counts, *bound):
        features = kept.column(number, "pooled", rows).astype(np.float64)
        own = labels[first : first + len(features)]
        first += len(features)
        if found is None:
            found = _Sums(np.zeros(classes, np.int64), np.zeros((classes, features.shape[1])), np.zeros(classes))
        order = np.argsort(own, kind="stable")
        present, starts, number_of = np.unique(own[order], return_index=True, return_counts=True)
        known = present >= 0
        found.counts[present[known]] += number_of[known]
        found.totals[present[known]] += np.add.reduceat(features[order], starts, axis=0)[known]
        found.squares[present[known]] += np.add.reduceat(np.einsum("nd,nd->n", features, features)[order], starts)[known]
    assert found is not None
    return found


def _merged(*parts: _Sums) -> _Sums:
    return _Sums(sum(one.counts for one in parts), sum(one.totals for one in parts), sum(one.squares for one in parts))  # type: ignore[arg-type]
