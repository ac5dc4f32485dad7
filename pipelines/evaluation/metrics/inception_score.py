"""Inception Score (arXiv 1606.03498, section 4), from sums over the classes' probabilities."""

from dataclasses import dataclass

import numpy as np
import scipy.special

SPLITS, SEED = 10, 2020


def splits(count: int, shuffled: bool = True, number: int = SPLITS, seed: int = SEED) -> np.ndarray:
    """The split of each of `count` samples, (N,) int64, as torch-fidelity assigns it.

    Split i holds the places [i·N//number, (i + 1)·N//number) of the permutation `RandomState(seed).permutation(N)`; not shuffled, of the
    samples in order.
    """
    order = np.random.RandomState(seed).permutation(count) if shuffled else np.arange(count)  # the published draws
    bounds = [split * count // number for split in range(number + 1)]
    found = np.empty(count, np.int64)
    found[order] = np.repeat(np.arange(number), np.diff(bounds))
    return found


@dataclass
class ScoreSums:
    """Sums of the samples of each of G groups (splits, or the blocks of a standard error)."""

    counts: np.ndarray  # (G,)
    negative_entropy: np.ndarray  # (G,): of Σ_c p log p
    probabilities: np.ndarray  # (G, C): of p

    @classmethod
    def of(cls, logits: np.ndarray, groups: np.ndarray, number: int) -> "ScoreSums":
        """Sums of logits (N, C), each in the group `groups` (N,), of which there are `number`."""
        logarithms = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
        probabilities = np.exp(logarithms)
        member = np.zeros((number, len(logits)))
        member[groups, np.arange(len(logits))] = 1.0
        return cls(member.sum(axis=1), member @ (probabilities * logarithms).sum(axis=1), member @ probabilities)

    def merge(self, other: "ScoreSums") -> None:
        """Add the sums of other samples."""
        self.counts += other.counts
        self.negative_entropy += other.negative_entropy
        self.probabilities += other.probabilities

    def scores(self) -> np.ndarray:
        """exp(mean KL(p ‖ mean p)) of each group, (G,); NaN for a group without samples.

        The mean divergence is the mean of Σ p log p minus Σ q log q with q the mean of p.
        """
        return _scores(self.counts, self.negative_entropy, self.probabilities)

    def scores_without(self) -> np.ndarray:
        """The score of all samples but those of each group, (G,): the replicates of a jackknife."""
        parts = (self.counts, self.negative_entropy, self.probabilities)
        return _scores(*(part.sum(axis=0) - part for part in parts))


def inception_score(logits: np.ndarray, shuffled: bool = True, number: int = SPLITS, seed: int = SEED) -> tuple[float, float]:
    """Mean and population standard deviation over the splits, of logits (N, C) without the last layer's bias."""
    scores = ScoreSums.of(logits, splits(len(logits), shuffled, number, seed), number).scores()
    return float(scores.mean()), float(scores.std())


def _scores(counts: np.ndarray, negative_entropy: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = probabilities / counts[:, None]
        return np.exp(negative_entropy / counts - scipy.special.xlogy(mean, mean).sum(axis=1))
