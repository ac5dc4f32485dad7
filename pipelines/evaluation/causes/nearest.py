"""The nearest training images of samples, in feature space: in tiles, as tasks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.metrics.precision_recall import TILE, squared_distances, squared_radii, tiles
from pipelines.evaluation.scoring.feature_shards import KeptFeatures
from pipelines.evaluation.scoring.pairs import rows_of
from pipelines.evaluation.scoring.tasks import Tasks

NEIGHBOURS = 3  # training images beside a sample
SAME = 1e-6  # squared distance, relative to the features' squared norm, up to which two images are the same one


@dataclass(frozen=True)
class Nearest:
    """For N images the K nearest training images, nearest first. `spacing`: the distance of the nearest training image itself to its own
    nearest other training image."""

    rows: np.ndarray  # (N, K) int64
    distances: np.ndarray  # (N, K)
    spacing: np.ndarray  # (N,)
    same: np.ndarray  # (N,) bool: the image is one of the training images

    @property
    def closer(self) -> np.ndarray:
        """Which images lie nearer to a training image than this lies to any other one: (N,) bool."""
        found: np.ndarray = self.distances[:, 0] < self.spacing
        return found

    @property
    def ratio(self) -> np.ndarray:
        """Distance to the nearest training image as a share of its spacing, (N,); NaN where both are 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found: np.ndarray = self.distances[:, 0] / self.spacing
            return found


class TrainingImages:
    """Features of training images, (T, D), shared with the tasks. Raises ValueError for NEIGHBOURS images or fewer."""

    def __init__(self, features: np.ndarray, tasks: Tasks) -> None:
        if len(features) <= NEIGHBOURS:
            raise ValueError(f"{len(features)} training images can be used, expected more than {NEIGHBOURS}")
        self._tasks, self._features = tasks, tasks.share(features)
        parts = tasks.results([tasks.call(_spacing, self._features, start) for start in range(0, len(features), TILE)])
        self._spacing = np.concatenate(parts)

    def nearest_to_kept(self, kept: KeptFeatures) -> Nearest:
        """Of kept features, at each place."""
        counts = kept.counts()
        return self._nearest(_nearest_to_kept, int(counts.sum()), kept, counts)

    def nearest_to(self, features: np.ndarray) -> Nearest:
        """Of features (N, D)."""
        return self._nearest(_nearest_to_rows, len(features), self._tasks.share(features))

    def _nearest(self, function: Callable[..., tuple[np.ndarray, ...]], total: int, *arguments: object) -> Nearest:
        calls = [self._tasks.call(function, self._features, start, *arguments) for start in range(0, total, TILE)]
        rows, squares, norms = (np.concatenate(part) for part in zip(*self._tasks.results(calls), strict=True))
        return Nearest(rows, np.sqrt(squares), np.sqrt(self._spacing[rows[:, 0]]), squares[:, 0] <= SAME * norms)


def _spacing(features: np.ndarray, start: int) -> np.ndarray:
    return squared_radii(features[start : start + TILE].astype(np.float64), start, tiles(features), neighbours=1)


def _nearest_to_kept(features: np.ndarray, start: int, kept: KeptFeatures, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    return nearest_rows(rows_of(kept, counts, start, start + TILE), features)


def _nearest_to_rows(features: np.ndarray, start: int, images: np.ndarray) -> tuple[np.ndarray, ...]:
    return nearest_rows(images[start : start + TILE], features)


def nearest_rows(images: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, D) and training images (T, D) → rows of the nearest training images (N, K), their squared distances (N, K), and the
    squared norms of the images (N,)."""
    images = images.astype(np.float64)
    rows, squares = np.empty((len(images), 0), np.int64), np.empty((len(images), 0))
    for start, tile in tiles(features):
        squares = np.concatenate([squares, squared_distances(images, tile)], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(np.arange(start, start + len(tile)), (len(images), len(tile)))], axis=1)
        order = np.argpartition(squares, min(NEIGHBOURS, squares.shape[1]) - 1, axis=1)[:, :NEIGHBOURS]
        rows, squares = np.take_along_axis(rows, order, 1), np.take_along_axis(squares, order, 1)
    order = np.lexsort((rows, squares))
    return np.take_along_axis(rows, order, 1), np.take_along_axis(squares, order, 1), np.einsum("nd,nd->n", images, images)
