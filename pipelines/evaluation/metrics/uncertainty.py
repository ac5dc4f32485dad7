"""How far a metric may be off: standard errors from blocks of samples, and the Fréchet distance of infinitely many."""

import numpy as np

BLOCKS = 10
SEED = 2020


def blocks(labels: np.ndarray, number: int = BLOCKS, seed: int = SEED) -> np.ndarray:
    """The block of each sample, (N,) int64: random, and every class in equal numbers in every block.

    labels: (N,), all equal where unknown.
    """
    shuffled = np.random.RandomState(seed).permutation(len(labels))  # the same draws in every version of numpy
    found = np.empty(len(labels), np.int64)
    found[np.lexsort((shuffled, labels))] = np.arange(len(labels)) % number
    return found


def fair_order(labels: np.ndarray) -> np.ndarray:
    """Numbers of the images, so that contiguous parts are such blocks: (N,) int64. labels: (N,)."""
    return np.argsort(blocks(labels), kind="stable")


def jackknife_error(without: np.ndarray) -> float:
    """Standard error of a metric from its values without each of the G blocks, (G,): √((G − 1)/G · Σ (θ₍₋g₎ − mean)²).

    Efron & Stein 1981; with deleted blocks: Shao & Wu 1989. From G blocks it is itself known to a share of about 1/√(2(G − 1)).
    """
    number = len(without)
    return float(np.sqrt((number - 1) / number * np.square(without - without.mean()).sum()))


def batch_error(values: np.ndarray) -> float:
    """Standard error of the mean of a metric's values of disjoint blocks, (G,): their standard deviation / √G."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def extrapolated(counts: np.ndarray, distances: np.ndarray) -> float:
    """Fréchet distance of infinitely many samples: the intercept of a line fitted to the distances over 1/N (arXiv 1911.07023, section 3).

    counts, distances: (K,), the distances of subsets of so many samples.
    """
    return float(np.polynomial.Polynomial.fit(1.0 / counts, distances, 1)(0.0))
