"""Fréchet distance of images and their reconstructions without some of the pairs: the replicates of its standard error.

Both sets change together. With one of them taken as it is, the distance would grow by every difference between the images left out and
those that remain, which has nothing to do with the reconstructions.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from pipelines.evaluation.metrics.frechet import FeatureSums, frechet_distance


def distances_without(first: np.ndarray, second: np.ndarray, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The distance of the paired features (N, D) and (N, D) without the rows of each of the G `bounds` (start, stop): (G,).

    Fast for N ≤ D: with centred X and Y, tr (Σ₁Σ₂)^½ is the sum of the singular values of XYᵀ / (n − 1).
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    product = first @ second.T
    found = []
    for start, stop in bounds:
        rows = np.r_[0:start, stop : len(first)]
        one, other, centred = first[rows], second[rows], product[np.ix_(rows, rows)]
        centred -= centred.mean(axis=0)
        centred -= centred.mean(axis=1, keepdims=True)
        means = one.mean(axis=0), other.mean(axis=0)
        variance = sum(np.square(part - mean).sum() for part, mean in zip((one, other), means, strict=True))
        cross = scipy.linalg.svdvals(centred).sum()
        found.append(np.square(means[0] - means[1]).sum() + (variance - 2 * cross) / (len(rows) - 1))
    return np.array(found)


def distance_without(number: int, *sums: tuple[FeatureSums, FeatureSums]) -> float:
    """The distance without the pairs of block `number`, from the sums of both sets in each block. For N > D."""
    sides = []
    for side in (0, 1):
        total = FeatureSums(len(sums[0][side].total))
        for block, parts in enumerate(sums):
            if block != number:
                total.merge(parts[side])
        sides.append(total.moments())
    return frechet_distance(*sides[0], *sides[1])
