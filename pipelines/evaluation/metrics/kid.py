"""Kernel Inception Distance (arXiv 1801.01401, section 4): unbiased squared maximum mean discrepancy with a cubic kernel."""

from collections.abc import Iterable, Iterator

import numpy as np

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
DEGREE = 3
FEW = 4096  # images of a set up to which the kernel of all pairs is computed at once
ROWS = 1024  # of the kernel's matrix that exist at once


def subset_rows(
    first: int, second: int, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the two sets, of so many images each, for every subset: (size,) int64 each, drawn without replacement as torch-fidelity does.

    One generator draws the rows of the first set, then those of the second, subset by subset. Raises ValueError for a set of fewer images
    than a subset.
    """
    if min(first, second) < size:
        raise ValueError(f"subsets of {size} images, of sets of {first} and {second}")
    generator = np.random.RandomState(seed)  # the published draws
    for _ in range(subsets):
        yield generator.choice(first, size, replace=False), generator.choice(second, size, replace=False)


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased estimate of MMD² of features (N, D) and (M, D) with the kernel (x·y/D + 1)³, in float64."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    n, m = len(first), len(second)
    within = (_kernel_sum_within(first) / (n * (n - 1))) + (_kernel_sum_within(second) / (m * (m - 1)))
    return float(within - 2.0 * _kernel_sum(first, second) / (n * m))


def subset_distances(first: np.ndarray, second: np.ndarray, subsets: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """MMD² of each subset of the rows of two small sets, (N, D) and (M, D): (subsets,). The kernel of all pairs is computed once."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    kernels = _kernel(first, first), _kernel(second, second), _kernel(first, second)
    found = []
    for one, two in subsets:
        within = [(kernel[np.ix_(rows, rows)].sum() - kernel[rows, rows].sum()) / (len(rows) * (len(rows) - 1))
                  for kernel, rows in ((kernels[0], one), (kernels[1], two))]  # fmt: skip
        found.append(within[0] + within[1] - 2.0 * kernels[2][np.ix_(one, two)].mean())
    return np.array(found)


def kernel_distance(
    first: np.ndarray, second: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> tuple[float, float]:
    """Mean and population standard deviation of MMD² over the subsets, of features (N, D) and (M, D)."""
    drawn = subset_rows(len(first), len(second), subsets, size, seed)
    if max(len(first), len(second)) <= FEW:
        found = subset_distances(first, second, drawn)
    else:
        found = np.array([squared_mmd(first[one], second[two]) for one, two in drawn])
    return float(found.mean()), float(found.std())


def _kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first @ second.T / first.shape[1] + 1.0) ** DEGREE


def _kernel_sum(first: np.ndarray, second: np.ndarray) -> float:
    """Sum over all pairs, in tiles of rows."""
    return float(sum(_kernel(first[start : start + ROWS], second).sum() for start in range(0, len(first), ROWS)))


def _kernel_sum_within(features: np.ndarray) -> float:
    """Sum over all pairs of two different rows."""
    own = (np.einsum("nd,nd->n", features, features) / features.shape[1] + 1.0) ** DEGREE
    return _kernel_sum(features, features) - float(own.sum())
