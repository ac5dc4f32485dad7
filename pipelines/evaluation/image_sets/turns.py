"""Images with the classes in turn."""

import numpy as np
import pyarrow as pa

from pipelines.images.sources.table import ImageRows


def interleaved(labels: np.ndarray) -> np.ndarray:
    """Numbers of the samples with the classes in turn, each class in its own order: (N,) int64."""
    by_class = np.argsort(labels, kind="stable")
    ordered = labels[by_class]
    starts = np.searchsorted(ordered, ordered, side="left")
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - starts
    return np.lexsort((labels, rank))


def in_turn(rows: ImageRows, count: int) -> ImageRows:
    """`count` rows of a listing (sorted by key), every class in turn; sorted by key again."""
    return ImageRows(rows.table.take(pa.array(np.sort(interleaved(rows.column("label"))[:count]))))
