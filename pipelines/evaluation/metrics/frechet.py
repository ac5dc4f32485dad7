"""Fréchet distance of two sets of features, from their means and covariances, all in float64."""

from functools import cached_property

import numpy as np
import scipy.linalg


class FeatureSums:
    """Count, sum and sum of outer products of the features seen so far: mean and covariance in one pass."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.total = np.zeros(dimension)  # (D,)
        self.outer = np.zeros((dimension, dimension))  # (D, D)

    @classmethod
    def of(cls, features: np.ndarray) -> "FeatureSums":
        """Sums of one block of features, (N, D)."""
        sums = cls.__new__(cls)
        features = features.astype(np.float64)
        sums.count, sums.total, sums.outer = len(features), features.sum(axis=0), features.T @ features
        return sums

    def merge(self, other: "FeatureSums") -> None:
        """Add the sums of other features. The same blocks in the same order give the same bits."""
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D), divided by count − 1 as `numpy.cov` does. Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"statistics of {self.count} image(s), expected 2 or more")
        mu = self.total / self.count
        return mu, (self.outer - self.count * np.outer(mu, mu)) / (self.count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Fréchet distance of two Gaussians: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) (Dowson & Landau 1982; arXiv 1706.08500, eq. 6).

    With Σ = FFᵀ, tr (Σ₁Σ₂)^½ is the sum of the singular values of F₁ᵀF₂: only symmetric decompositions, no complex numbers, no
    regularisation, and fast where fewer images than dimensions leave Σ with a low rank.
    """
    return FrechetReference(mu2, sigma2).distance(mu1, sigma1)


class FrechetReference:
    """One side of many Fréchet distances: its covariance is factored once."""

    def __init__(self, mu: np.ndarray, sigma: np.ndarray) -> None:
        """mu: (D,), sigma: (D, D)."""
        self.mu, self.sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)

    @cached_property
    def factor(self) -> np.ndarray:
        """F (D, rank) with FFᵀ = Σ; eigenvalues that are rounding errors are left out."""
        return _factor(self.sigma)

    def distance(self, mu: np.ndarray, sigma: np.ndarray) -> float:
        """The distance to a Gaussian, at full accuracy."""
        return self._distance(mu, sigma, float(scipy.linalg.svdvals(_factor(sigma).T @ self.factor).sum()))

    def approximate_distance(self, mu: np.ndarray, sigma: np.ndarray) -> float:
        """The same in a third of the time, with an error of about 1e-6 relative: tr (Σ₁Σ₂)^½ = tr (F₂ᵀΣ₁F₂)^½.

        For standard errors and extrapolations, which need many distances.
        """
        eigenvalues = scipy.linalg.eigvalsh(self.factor.T @ sigma @ self.factor)
        return self._distance(mu, sigma, float(np.sqrt(eigenvalues.clip(0)).sum()))

    def _distance(self, mu: np.ndarray, sigma: np.ndarray, cross: float) -> float:
        shift = np.asarray(mu, np.float64) - self.mu
        return float(shift @ shift + np.trace(sigma) + np.trace(self.sigma) - 2.0 * cross)


def _factor(sigma: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(np.asarray(sigma, np.float64), driver="evd")
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
