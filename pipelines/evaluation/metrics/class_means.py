"""Means of features by class, and the distances of two sets' means."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassMeans:
    """Means of the pooled features of the images of each class. NaN for a class without images."""

    counts: np.ndarray  # (C,) int64
    means: np.ndarray  # (C, D)
    noise: np.ndarray  # (C,): tr Σ / n, the expected squared distance of the mean from its limit; NaN for fewer than two images

    def distances(self, others: "ClassMeans") -> np.ndarray:
        """Unbiased estimate of ‖μ₁ − μ₂‖² for each class, (C,): ‖m₁ − m₂‖² − tr Σ₁/n₁ − tr Σ₂/n₂. It can be negative where the means are
        equal; NaN for a class with fewer than two images in one of the sets."""
        return np.square(self.means - others.means).sum(axis=1) - self.noise - others.noise

    def distances_to(self, mean: np.ndarray) -> np.ndarray:
        """The same to one fixed mean (D,)."""
        return np.square(self.means - mean).sum(axis=1) - self.noise
