"""Metrics of kept features against a reference, each with its standard error."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.evaluation.features.sizes import LOGITS
from pipelines.evaluation.metrics import kid, precision_recall, uncertainty
from pipelines.evaluation.metrics.definitions import METRICS, described, names_of
from pipelines.evaluation.metrics.frechet import FeatureSums, FrechetReference
from pipelines.evaluation.metrics.inception_score import SPLITS, ScoreSums, splits
from pipelines.evaluation.reference_file import Reference
from pipelines.evaluation.scoring.feature_shards import KeptFeatures
from pipelines.evaluation.scoring.pairs import block_bounds, coverage, kernel_distance_blocks, kernel_distances
from pipelines.evaluation.scoring.sums import Sums, sums_of
from pipelines.evaluation.scoring.tasks import Tasks

HERE = 4096  # images up to which everything is computed in this process
SMALLEST_SUBSET = 3  # blocks of the smallest subset that the Fréchet distance is extrapolated from
ERRORS = (
    f"of the samples, the reference taken as it is, from {uncertainty.BLOCKS} blocks of samples. Fréchet distances and the score "
    "of classes: jackknife over the blocks left out one by one; kernel distance, precision, recall and label agreement: standard "
    "deviation of the blocks' values over the root of their number (for recall of blocks of reference images)"
)


@dataclass
class Measured:
    """Metrics by name. `left_out`: those that could not be computed, with the reason. `moments`: of the pooled features."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    extrapolated: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)
    moments: FeatureSums | None = None
    inside: np.ndarray | None = None  # (N,) bool: at each place, whether the sample lies in a ball of the reference


@dataclass(frozen=True)
class Measuring:
    """A set of kept features that is measured. `features`: the network's name."""

    kept: KeptFeatures
    features: str
    counts: np.ndarray
    index: np.ndarray  # of each place
    tasks: Tasks

    @classmethod
    def of(cls, kept: KeptFeatures, features: str, reference_rows: int = 0) -> "Measuring":
        counts = kept.counts()
        return cls(kept, features, counts, kept.numbers()["index"], Tasks(max(int(counts.sum()), reference_rows) <= HERE))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def block_sums(self) -> list[Any]:
        """Started calls for the sums of each block of samples."""
        of_split = splits(self.total) if LOGITS[self.features] else None
        bounds = block_bounds(self.total)
        return [
            sums_of(self.kept, self.counts, start, stop, of_split, self.tasks) for start, stop in itertools.pairwise(bounds) if stop > start
        ]


def measure(kept: KeptFeatures, features: str, reference: Reference, metrics: Sequence[str]) -> Measured:
    """These metrics (keys of METRICS) of the kept features, those that the reference allows."""
    rows = 0 if reference.features is None else len(reference.features)
    one = Measuring.of(kept, features, rows)
    found = Measured()
    sums = one.block_sums()
    found.moments = one.tasks.results([one.tasks.call(_pooled, *sums)])[0]
    for metric in metrics:
        missing = [reference.lacking[part] for part in METRICS[metric].needs if part in reference.lacking]
        if missing:
            _leave_out(found, metric, features, missing[0])
        else:
            MEASURES[metric](one, sums, reference, found)
    asked = {name for metric in metrics for name in names_of(metric, features)}
    for kind in (found.values, found.errors, found.definitions):
        for name in kind.keys() - asked:  # precision comes with recall
            del kind[name]
    return found


def _frechet(metric: str) -> Callable[[Measuring, list[Any], Reference, Measured], None]:
    def add(one: Measuring, sums: list[Any], reference: Reference, found: Measured) -> None:
        statistics = reference.pooled if metric == "fid" else reference.spatial
        [(value, error, limit)] = one.tasks.results([one.tasks.call(_frechet_of, metric == "fid", one.tasks.share(statistics), *sums)])
        [name] = names_of(metric, one.features)
        found.values[name] = value
        found.errors[name] = error
        if limit is not None:
            found.extrapolated[name] = limit
        found.definitions[name] = described(metric, one.features)

    return add


def _frechet_of(pooled: bool, reference: tuple[np.ndarray, np.ndarray], *blocks: Sums) -> tuple[float, float, float | None]:
    """The distance of all blocks, its standard error, and, for pooled features of enough samples, that of infinitely many."""
    parts = [one.pooled if pooled else one.spatial for one in blocks]
    whole = _total(parts)
    if whole.count < 2:
        return float("nan"), float("nan"), None
    known = FrechetReference(*reference)
    value = known.distance(*whole.moments())
    if len(parts) < uncertainty.BLOCKS:
        return value, float("nan"), None
    blocks_projected = [known.project(part) for part in parts]
    total = functools.reduce(operator.add, blocks_projected)
    without = [known.approximate_distance(total - block) for block in blocks_projected]
    error = uncertainty.jackknife_error(np.array(without))
    if not pooled or SMALLEST_SUBSET * whole.count < len(parts) * len(whole.total):
        return value, error, None
    subsets = []
    for number in range(SMALLEST_SUBSET, len(parts) + 1):
        chosen = np.random.RandomState(uncertainty.SEED + number).permutation(len(parts))[:number]
        subsets.append(functools.reduce(operator.add, [blocks_projected[block] for block in chosen]))
    distances = np.array([known.approximate_distance(subset) for subset in subsets])
    return value, error, uncertainty.extrapolated(np.array([subset.count for subset in subsets]), distances)


def _inception_score(one: Measuring, sums: list[Any], reference: Reference, found: Measured) -> None:
    names = names_of("inception_score", one.features)
    if one.total < SPLITS:
        _leave_out(found, "inception_score", one.features, f"{one.total} samples, expected {SPLITS} or more: one in each split")
        return
    [(by_split, blocks)] = one.tasks.results([one.tasks.call(_scores, *sums)])
    scores = by_split.scores()
    found.values |= dict(zip(names, (float(scores.mean()), float(scores.std())), strict=True))
    found.errors[names[0]] = uncertainty.jackknife_error(blocks.scores_without())
    found.definitions |= dict.fromkeys(names, described("inception_score", one.features))


def _scores(*blocks: Sums) -> tuple[ScoreSums, ScoreSums]:
    """Sums by split of all blocks, and by block."""
    scores = [one.score for one in blocks if one.score is not None]
    by_split = [one.splits for one in blocks if one.splits is not None]
    total = ScoreSums(*(np.zeros_like(part) for part in (by_split[0].counts, by_split[0].negative_entropy, by_split[0].probabilities)))
    for part in by_split:
        total.merge(part)
    counts, entropies = (np.concatenate([getattr(one, name) for one in scores]) for name in ("counts", "negative_entropy"))
    return total, ScoreSums(counts, entropies, np.concatenate([one.probabilities for one in scores]))


def _kernel_distance(one: Measuring, sums: list[Any], reference: Reference, found: Measured) -> None:
    assert reference.features is not None
    size = min(kid.SUBSET_SIZE, one.total, len(reference.features))
    if size < 2:
        _leave_out(found, "kid", one.features, f"{size} image, expected 2 or more")
        return
    names = names_of("kid", one.features)
    places = np.argsort(one.index)
    distances = kernel_distances(one.kept, one.counts, places, reference.features, size, one.tasks)
    found.values |= dict(zip(names, (float(distances.mean()), float(distances.std())), strict=True))
    if min(one.total, len(reference.features)) >= 2 * uncertainty.BLOCKS:
        found.errors[names[0]] = uncertainty.batch_error(kernel_distance_blocks(one.kept, one.counts, reference.features, one.tasks))
    found.definitions |= dict.fromkeys(names, described("kid", one.features, {"subset_size": size, **_reference_rows(reference)}))


def _precision_recall(one: Measuring, sums: list[Any], reference: Reference, found: Measured) -> None:
    """Both, from one pass over all pairs."""
    assert reference.features is not None
    names = {metric: names_of(metric, one.features)[0] for metric in ("precision", "recall")}
    if names["precision"] in found.values:
        return
    fewest = min(one.total, len(reference.features))
    if fewest <= precision_recall.NEIGHBOURS:
        for metric in names:
            _leave_out(found, metric, one.features, f"{fewest} images, expected more than {precision_recall.NEIGHBOURS}")
        return
    flags = dict(zip(names, coverage(one.kept, one.counts, reference.features, one.tasks), strict=True))
    found.inside = flags["precision"]
    for metric, name in names.items():
        found.values[name] = float(flags[metric].mean())
        found.errors[name] = share_error(flags[metric])
        found.definitions[name] = described(metric, one.features, _reference_rows(reference))


def share_error(flags: np.ndarray) -> float:
    """Standard error of a share, from the shares of random blocks of flags (N,); NaN for fewer flags than blocks."""
    if len(flags) < uncertainty.BLOCKS:
        return float("nan")
    blocks = uncertainty.blocks(np.zeros(len(flags), np.int64))
    return uncertainty.batch_error(np.array([flags[blocks == number].mean() for number in range(uncertainty.BLOCKS)]))


MEASURES: dict[str, Callable[[Measuring, list[Any], Reference, Measured], None]] = {
    "fid": _frechet("fid"),
    "sfid": _frechet("sfid"),
    "inception_score": _inception_score,
    "kid": _kernel_distance,
    "precision": _precision_recall,
    "recall": _precision_recall,
}


def _reference_rows(reference: Reference) -> dict[str, int]:
    return {} if reference.features is None else {"reference_images": len(reference.features)}


def _pooled(*blocks: Sums) -> FeatureSums:
    return _total([one.pooled for one in blocks])


def _total(parts: Sequence[FeatureSums]) -> FeatureSums:
    found = FeatureSums(len(parts[0].total))
    for part in parts:
        found.merge(part)
    return found


def _leave_out(found: Measured, metric: str, features: str, reason: str) -> None:
    for name in names_of(metric, features):
        found.left_out[name] = reason
