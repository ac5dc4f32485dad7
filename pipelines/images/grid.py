"""A grid of images as one PNG file."""

import io

import numpy as np
from PIL import Image

from pipelines.runtime import storage

GRID_CLASSES = 20  # with at most this many classes the grid has a row per class

GRID_COLUMNS = 10

GRID_GAP = 2  # pixels

SHOWN_SIDE = 64  # smaller images are enlarged in the grid


def encoded(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)  # level 6 takes four times as long for a tenth less
    return buffer.getvalue()


def write_grid(path: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write `grid` as a PNG file."""
    storage.write_bytes(path, encoded(grid(images, labels)))


def grid(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Arrange images (N, H, W, 3) in one picture (H', W', 3), uint8: a row per class if there are few classes, else in order."""
    classes = np.unique(labels)
    if len(classes) <= GRID_CLASSES:
        rows = [images[labels == label][:GRID_COLUMNS] for label in classes]
    else:
        rows = [images[start : start + GRID_COLUMNS] for start in range(0, min(len(images), GRID_COLUMNS**2), GRID_COLUMNS)]
    enlarged = -(-SHOWN_SIDE // images.shape[1])
    rows = [row.repeat(enlarged, axis=1).repeat(enlarged, axis=2) for row in rows]
    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    picture = np.full((len(rows) * (height + GRID_GAP) + GRID_GAP, columns * (width + GRID_GAP) + GRID_GAP, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = GRID_GAP + y * (height + GRID_GAP), GRID_GAP + x * (width + GRID_GAP)
            picture[top : top + height, left : left + width] = image
    return picture


def grid_samples(total: int, classes: int) -> int:
    """Number of samples, from the first, that contain all images shown by `write_grid` when classes alternate."""
    return min(total, classes * GRID_COLUMNS if classes <= GRID_CLASSES else GRID_COLUMNS**2)
