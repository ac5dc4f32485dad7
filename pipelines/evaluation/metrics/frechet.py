"""Fréchet distance of two sets of features, from their means and covariances, all in float64."""

from dataclasses import dataclass
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

    def project(self, sums: FeatureSums) -> "ProjectedSums":
        """What many distances of unions of blocks need of one block."""
        squares = float(np.trace(sums.outer))
        return ProjectedSums(sums.count, sums.total, squares, sums.total @ self.factor, self.factor.T @ sums.outer @ self.factor)

    def approximate_distance(self, sums: "ProjectedSums") -> float:
        """The distance to what the sums are of, in a fraction of the time, with an error of about 1e-6 relative: tr (Σ₁Σ₂)^½ is
        tr (F₂ᵀΣ₁F₂)^½. For standard errors and extrapolations."""
        mu, projected = sums.total / sums.count, sums.projected_total / sums.count
        sigma = (sums.projected_outer - sums.count * np.outer(projected, projected)) / (sums.count - 1)
        trace = (sums.squares - sums.count * float(mu @ mu)) / (sums.count - 1)
        shift = mu - self.mu
        cross = float(np.sqrt(scipy.linalg.eigvalsh(sigma).clip(0)).sum())
        return float(shift @ shift + trace + np.trace(self.sigma) - 2.0 * cross)

    def _distance(self, mu: np.ndarray, sigma: np.ndarray, cross: float) -> float:
        shift = np.asarray(mu, np.float64) - self.mu
        return float(shift @ shift + np.trace(sigma) + np.trace(self.sigma) - 2.0 * cross)


@dataclass(frozen=True)
class ProjectedSums:
    """Sums of features in the coordinates of a reference's factor F (D, R); they add up as the features' own do."""

    count: int
    total: np.ndarray  # (D,)
    squares: float  # trace of the sum of outer products
    projected_total: np.ndarray  # (R,)
    projected_outer: np.ndarray  # (R, R)

    def __add__(self, other: "ProjectedSums") -> "ProjectedSums":
        return self._with(other, 1)

    def __sub__(self, other: "ProjectedSums") -> "ProjectedSums":
        return self._with(other, -1)

    def _with(self, other: "ProjectedSums", sign: int) -> "ProjectedSums":
        return ProjectedSums(
            self.count + sign * other.count,
            self.total + sign * other.total,
            self.squares + sign * other.squares,
            self.projected_total + sign * other.projected_total,
            self.projected_outer + sign * other.projected_outer,
        )


def _factor(sigma: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(np.asarray(sigma, np.float64), driver="evd")
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
