"""Precision and recall (Kynkäänniemi et al., arXiv 1904.06991, section 2): which images lie in the balls of the other set.

Everything is computed in tiles of rows × columns, so that the matrix of all distances never exists. Distances are squared, in float64.
"""

from collections.abc import Iterable, Iterator

import numpy as np

NEIGHBOURS = 3
TILE = 2048  # rows and columns of a tile


def squared_distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(N, D) and (M, D) → (N, M) float64."""
    rows, columns = rows.astype(np.float64, copy=False), columns.astype(np.float64, copy=False)
    distances = rows @ columns.T
    distances *= -2.0
    distances += np.einsum("nd,nd->n", rows, rows)[:, None]
    distances += np.einsum("md,md->m", columns, columns)
    return distances.clip(0, out=distances)


def tiles(features: np.ndarray, size: int = TILE) -> Iterator[tuple[int, np.ndarray]]:
    """Position of its first row, and a part of features (N, D) of at most `size` rows."""
    for start in range(0, len(features), size):
        yield start, features[start : start + size]


def squared_radii(rows: np.ndarray, start: int, columns: Iterable[tuple[int, np.ndarray]], neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Squared distance of each row to its k-th neighbour among the columns, the row itself not counted: (N,).

    rows: (N, D), the rows `start` … of the set that `columns` gives all of, in tiles. Raises ValueError for a set of k images or fewer.
    """
    nearest = np.empty((len(rows), 0))
    for first, tile in columns:
        distances = squared_distances(rows, tile)
        own = np.arange(max(start, first), min(start + len(rows), first + len(tile)))  # positions that are a row and a column
        distances[own - start, own - first] = np.inf
        nearest = np.concatenate([nearest, distances], axis=1)
        if nearest.shape[1] > neighbours:
            nearest = np.partition(nearest, neighbours - 1, axis=1)[:, :neighbours]
    if nearest.shape[1] < neighbours or not np.isfinite(nearest).all():
        raise ValueError(f"a ball reaches to the neighbour {neighbours}: expected more than {neighbours} images")
    return nearest.max(axis=1)


def precision_recall(generated: np.ndarray, reference: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of generated images (N, D) in a ball of some reference image (M, D), and the reverse."""
    balls = [
        np.concatenate([squared_radii(tile, start, tiles(features), neighbours) for start, tile in tiles(features)])
        for features in (generated, reference)
    ]
    inside, covered = np.zeros(len(generated), bool), np.zeros(len(reference), bool)
    for start, tile in tiles(generated):
        found = inside_balls(tile, reference, balls[0][start : start + len(tile)], balls[1])
        inside[start : start + len(tile)] = found[0]
        covered |= found[1]
    return float(inside.mean()), float(covered.mean())


def inside_balls(rows: np.ndarray, columns: np.ndarray, row_radii: np.ndarray, column_radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows (N, D) lie in a ball of some column (M, D), and which columns in a ball of some row: (N,) and (M,) bool.

    Radii are squared, (N,) and (M,); a point on the surface lies inside.
    """
    inside, covered = np.zeros(len(rows), bool), np.zeros(len(columns), bool)
    for start, tile in tiles(columns):
        distances = squared_distances(rows, tile)
        stop = start + len(tile)
        inside |= (distances <= column_radii[start:stop]).any(axis=1)
        covered[start:stop] |= (distances <= row_radii[:, None]).any(axis=0)
    return inside, covered
