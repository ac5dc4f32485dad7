"""Metrics of pairs of kept features, block by block: each task holds one tile of rows and goes through the columns tile by tile."""

from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.evaluation.metrics import kid, uncertainty
from pipelines.evaluation.metrics.precision_recall import TILE, inside_balls, squared_radii, tiles
from pipelines.evaluation.scoring.feature_shards import KeptFeatures, pieces
from pipelines.evaluation.scoring.tasks import Tasks

SUBSETS_A_TASK = 10


def coverage(kept: KeptFeatures, counts: np.ndarray, reference: np.ndarray, tasks: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """Which images lie in a ball of the reference, and which reference images in a ball of the images: (N,) and (M,) bool.

    reference: features (M, D). Raises ValueError where one of the sets has 3 images or fewer.
    """
    shared = tasks.share(reference)
    parts = tasks.results([tasks.call(_reference_radii, shared, start) for start in range(0, len(reference), TILE)])
    radii = tasks.share(np.concatenate(parts))
    total = int(counts.sum())
    found = tasks.results([tasks.call(_covered, kept, counts, start, shared, radii) for start in range(0, total, TILE)])
    return np.concatenate([inside for inside, _ in found]), np.logical_or.reduce([covered for _, covered in found])


def _reference_radii(reference: np.ndarray, start: int) -> np.ndarray:
    return squared_radii(reference[start : start + TILE].astype(np.float64), start, tiles(reference))


def _covered(
    kept: KeptFeatures, counts: np.ndarray, start: int, reference: np.ndarray, reference_radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of one tile of images: which lie in a ball of the reference (n,), and which reference images in a ball of theirs (M,)."""
    rows = rows_of(kept, counts, start, start + TILE).astype(np.float64)
    radii = squared_radii(rows, start, _all_tiles(kept, counts))
    return inside_balls(rows, reference, radii, reference_radii)


def kernel_distances(
    kept: KeptFeatures, counts: np.ndarray, places: np.ndarray, reference: np.ndarray, size: int, tasks: Tasks
) -> np.ndarray:
    """MMD² of every subset of `size` images, (subsets,). places: of each image by its index; reference: features (M, D)."""
    if max(int(counts.sum()), len(reference)) <= kid.FEW:
        features = rows_at(kept, counts, places)
        return kid.subset_distances(features, reference, kid.subset_rows(len(features), len(reference), size=size))
    shared = tasks.share(reference)
    subsets = [(places[one], two) for one, two in kid.subset_rows(int(counts.sum()), len(reference), size=size)]
    parts = [subsets[first : first + SUBSETS_A_TASK] for first in range(0, len(subsets), SUBSETS_A_TASK)]
    return np.concatenate(tasks.results([tasks.call(_kernel_distances, kept, counts, part, shared) for part in parts]))


def kernel_distance_blocks(kept: KeptFeatures, counts: np.ndarray, reference: np.ndarray, tasks: Tasks) -> np.ndarray:
    """MMD² of disjoint blocks of images, each with its own block of the reference: (blocks,)."""
    shared, total = tasks.share(reference), int(counts.sum())
    blocks = uncertainty.blocks(np.zeros(len(reference), np.int64))
    bounds = block_bounds(total)
    calls = [
        tasks.call(_kernel_distance_of_block, kept, counts, bounds[number], bounds[number + 1], shared, np.flatnonzero(blocks == number))
        for number in range(uncertainty.BLOCKS)
    ]
    return np.array(tasks.results(calls))


def block_bounds(total: int) -> list[int]:
    """Where the blocks of a standard error begin and end, in places."""
    return [number * total // uncertainty.BLOCKS for number in range(uncertainty.BLOCKS + 1)]


def rows_of(kept: KeptFeatures, counts: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Pooled features at the places `start` to `stop`, float32 (n, D)."""
    return np.concatenate([kept.column(number, "pooled", rows) for number, rows in pieces(counts, start, stop)])


def rows_at(kept: KeptFeatures, counts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Pooled features at these places, in their order, float32 (n, D)."""
    bounds = np.concatenate([[0], np.cumsum(counts)])
    numbers = np.searchsorted(bounds, places, side="right") - 1
    found: np.ndarray | None = None
    for number in np.unique(numbers):
        chosen = np.flatnonzero(numbers == number)
        rows = kept.column(int(number), "pooled", places[chosen] - bounds[number])
        found = np.empty((len(places), rows.shape[1]), np.float32) if found is None else found
        found[chosen] = rows
    assert found is not None
    return found


def _all_tiles(kept: KeptFeatures, counts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, int(counts.sum()), TILE):
        yield start, rows_of(kept, counts, start, start + TILE)


def _kernel_distances(
    kept: KeptFeatures, counts: np.ndarray, subsets: Sequence[tuple[np.ndarray, np.ndarray]], reference: np.ndarray
) -> np.ndarray:
    return np.array([kid.squared_mmd(rows_at(kept, counts, one), reference[two]) for one, two in subsets])


def _kernel_distance_of_block(
    kept: KeptFeatures, counts: np.ndarray, start: int, stop: int, reference: np.ndarray, rows: np.ndarray
) -> float:
    return kid.squared_mmd(rows_of(kept, counts, start, stop), reference[rows])
