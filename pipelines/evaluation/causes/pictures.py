"""Pictures with one row of images for each class or sample."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipelines.images.grid import GRID_GAP, SHOWN_SIDE, encoded
from pipelines.runtime import storage

MOST_SIDE = 128  # pixels; larger images are made smaller


def write_rows(path: str, rows: Sequence[Sequence[np.ndarray | None]]) -> None:
    """Write rows of images (H, W, 3), uint8, as one PNG file; None leaves a place white. Each row has the same height, so that the picture
    can be divided into rows again."""
    first = next(image for row in rows for image in row if image is not None)
    height, width = shown(first).shape[:2]
    columns = max(map(len, rows))
    picture = np.full((len(rows) * (height + GRID_GAP), columns * (width + GRID_GAP), 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is not None:
                top, left = y * (height + GRID_GAP), x * (width + GRID_GAP)
                picture[top : top + height, left : left + width] = shown(image)
    storage.write_bytes(path, encoded(picture))


def shown(image: np.ndarray) -> np.ndarray:
    """The image enlarged by a whole factor to SHOWN_SIDE at least, or made smaller to MOST_SIDE at most."""
    height, width = image.shape[:2]
    if max(height, width) > MOST_SIDE:
        scale = MOST_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    factor = -(-SHOWN_SIDE // height)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
