"""Golden records of metrics: what torch-fidelity gives for recorded features, against this implementation."""

from collections.abc import Iterator, Mapping

import numpy as np

from pipelines.evaluation.metrics.frechet import FeatureSums, frechet_distance
from pipelines.evaluation.metrics.inception_score import inception_score
from pipelines.evaluation.metrics.kid import kernel_distance
from pipelines.evaluation.metrics.precision_recall import precision_recall

ARRAYS = ("generated.features", "reference.features", "generated.logits")
NUMBERS = ("kid_subsets", "kid_subset_size", "inception_score_splits", "seed", "neighbours")  # in the metadata
BOUNDS = {  # and whether the error is relative
    "frechet_distance": (1e-5, True),
    "kid_mean": (1e-6, False),
    "kid_std": (1e-6, False),
    "inception_score_mean": (1e-6, True),
    "inception_score_std": (1e-6, True),
    "inception_score_mean_unshuffled": (1e-6, True),
    "precision": (1e-6, False),  # recorded in float32
    "recall": (1e-6, False),
}


def metric_errors(
    arrays: Mapping[str, np.ndarray], numbers: Mapping[str, int], expected: Mapping[str, float]
) -> Iterator[tuple[str, float | None, float]]:
    """(name, error, bound) of every expected value; no error for one whose arrays are not there, and the bound 0 for an unknown name.

    Raises ValueError for arrays that are no features and logits.
    """
    found = dict(_computed(arrays, numbers))
    for name, value in expected.items():
        bound, relative = BOUNDS.get(name, (0.0, False))
        error = abs(found[name] - value) if name in found else None
        yield name, error / abs(value) if relative and value and error is not None else error, bound


def _computed(arrays: Mapping[str, np.ndarray], numbers: Mapping[str, int]) -> Iterator[tuple[str, float]]:
    generated, reference, logits = (arrays.get(name) for name in ARRAYS)
    if any(one is not None and one.ndim != 2 for one in (generated, reference, logits)):
        raise ValueError("features and logits of another shape than (N, D)")
    if logits is not None:
        splits, seed = numbers["inception_score_splits"], numbers["seed"]
        yield from zip(("inception_score_mean", "inception_score_std"), inception_score(logits, True, splits, seed), strict=True)
        yield "inception_score_mean_unshuffled", inception_score(logits, False, splits, seed)[0]
    if generated is None or reference is None:
        return
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(f"{generated.shape[1]} generated and {reference.shape[1]} reference features")
    yield "frechet_distance", frechet_distance(*FeatureSums.of(generated).moments(), *FeatureSums.of(reference).moments())
    found = kernel_distance(generated, reference, numbers["kid_subsets"], numbers["kid_subset_size"], numbers["seed"])
    yield from zip(("kid_mean", "kid_std"), found, strict=True)
    yield from zip(("precision", "recall"), precision_recall(generated, reference, numbers["neighbours"]), strict=True)
