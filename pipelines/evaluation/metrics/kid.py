"""Kernel Inception Distance (arXiv 1801.01401, section 4): unbiased squared maximum mean discrepancy with a cubic kernel."""

from collections.abc import Iterator

import numpy as np

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
DEGREE = 3


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
    return float(within - 2.0 * _kernel(first, second).mean())


def kernel_distance(
    first: np.ndarray, second: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> tuple[float, float]:
    """Mean and population standard deviation of MMD² over the subsets, of features (N, D) and (M, D)."""
    found = [squared_mmd(first[one], second[two]) for one, two in subset_rows(len(first), len(second), subsets, size, seed)]
    return float(np.mean(found)), float(np.std(found))


def _kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first @ second.T / first.shape[1] + 1.0) ** DEGREE


def _kernel_sum_within(features: np.ndarray) -> float:
    """Sum over all pairs of two different rows."""
    kernel = _kernel(features, features)
    return float(kernel.sum() - np.trace(kernel))
