"""Sums over kept features: what means, covariances and Inception Scores are made of."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.metrics.frechet import FeatureSums
from pipelines.evaluation.metrics.inception_score import SPLITS, ScoreSums
from pipelines.evaluation.scoring.feature_shards import KeptFeatures, pieces
from pipelines.evaluation.scoring.tasks import Tasks

ROWS = 1024  # multiplied at once
GROUP = 8192  # images that one task sums


@dataclass(frozen=True)
class Sums:
    """Of one block of a set's images. `splits`: by the splits of the Inception Score, `score`: of the whole block."""

    pooled: FeatureSums
    spatial: FeatureSums
    splits: ScoreSums | None
    score: ScoreSums | None


def sums_of(kept: KeptFeatures, counts: np.ndarray, start: int, stop: int, splits: np.ndarray | None, tasks: Tasks) -> Sums:
    """Sums of the images at the places `start` to `stop`: a call for each group of images, merged in a tree. `splits`: of each image, by
    its index; None: no scores. Returns the (started) call's result."""
    bounds = [*range(start, stop, GROUP), stop]
    calls = [tasks.call(_group, kept, counts, *bound, splits) for bound in itertools.pairwise(bounds)]
    found: Sums = tasks.merged(calls, merged)
    return found


def merged(*parts: Sums) -> Sums:
    """Of the images of all parts."""
    first = parts[0]
    found = Sums(
        _zero(first.pooled),
        _zero(first.spatial),
        None if first.splits is None else _no_scores(first.splits),
        None if first.score is None else _no_scores(first.score),
    )
    for part in parts:
        found.pooled.merge(part.pooled)
        found.spatial.merge(part.spatial)
        for own, other in ((found.splits, part.splits), (found.score, part.score)):
            if own is not None and other is not None:
                own.merge(other)
    return found


def _group(kept: KeptFeatures, counts: np.ndarray, start: int, stop: int, splits: np.ndarray | None) -> Sums:
    found = {}
    for name in ("pooled", "spatial"):
        sums: FeatureSums | None = None
        for values in _gathered(kept, counts, start, stop, name):
            sums = FeatureSums(values.shape[1]) if sums is None else sums
            sums.merge(FeatureSums.of(values))
        assert sums is not None
        found[name] = sums
    if splits is None:
        return Sums(found["pooled"], found["spatial"], None, None)
    index = np.concatenate([kept.index(number)[rows] for number, rows in pieces(counts, start, stop)])
    by_split: ScoreSums | None = None
    whole: ScoreSums | None = None
    first = 0
    for logits in _gathered(kept, counts, start, stop, "logits"):
        groups = splits[index[first : first + len(logits)]]
        first += len(logits)
        parts = ScoreSums.of(logits, groups, SPLITS), ScoreSums.of(logits, np.zeros(len(logits), np.int64), 1)
        if by_split is None or whole is None:
            by_split, whole = parts
        else:
            by_split.merge(parts[0])
            whole.merge(parts[1])
    return Sums(found["pooled"], found["spatial"], by_split, whole)


def _gathered(kept: KeptFeatures, counts: np.ndarray, start: int, stop: int, name: str) -> Iterator[np.ndarray]:
    """The rows of a column, some shards at a time: (≤ ROWS + a shard, D)."""
    waiting: list[np.ndarray] = []
    for number, rows in pieces(counts, start, stop):
        waiting.append(kept.column(number, name, rows))
        if sum(map(len, waiting)) >= ROWS:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _zero(like: FeatureSums) -> FeatureSums:
    return FeatureSums(len(like.total))


def _no_scores(like: ScoreSums) -> ScoreSums:
    return ScoreSums(np.zeros_like(like.counts), np.zeros_like(like.negative_entropy), np.zeros_like(like.probabilities))
