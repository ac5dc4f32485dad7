"""Samples as the file that ADM's evaluation suite reads."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines.evaluation import npz
from pipelines.evaluation.image_sets.given import own_shards
from pipelines.evaluation.image_sets.readers import GivenSamples
from pipelines.generation import samples
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

FOLDERS = ("", "evaluation", "samples")  # where a run's shards lie
BATCH = 64  # images in memory


def export_samples(run: str, file: str) -> dict[str, Any]:
    """Write `arr_0` (uint8, N×H×W×3) and the labels `arr_1` (int64) of the samples in `run` to `file`, a batch in memory at a time.

    The classes take turns: ADM's suite computes the Inception Score of parts of 5,000 without shuffling. Returns a summary.
    Raises UserError where there are no samples, or some are missing.
    """
    if not file.endswith(".npz"):
        raise UserError(f"--samples is {file!r}, expected the name of an .npz file")
    folders = [storage.join(run, name) if name else run for name in FOLDERS]
    path = next((folder for folder in folders if samples.shards_there(folder)), None)
    if path is None:
        found = f"{run!r} holds no samples: no shards/samples-….parquet there, in evaluation/ or in samples/"
        raise UserError(found, remedy="run `mar evaluate`")
    given = own_shards(path)
    order = interleaved(given.labels)
    with npz.writing(file) as writer:
        writer.rows("arr_0", (len(order), *given.shape, 3), np.uint8, _parts(given, order))
        writer.array("arr_1", given.labels[order])
    return {"file": file, "samples": len(order), "height": given.shape[0], "width": given.shape[1], "classes": len(np.unique(given.labels))}


def interleaved(labels: np.ndarray) -> np.ndarray:
    """Numbers of the samples with the classes in turn, each class in its own order: (N,) int64."""
    by_class = np.argsort(labels, kind="stable")
    ordered = labels[by_class]
    starts = np.searchsorted(ordered, ordered, side="left")
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - starts
    return np.lexsort((labels, rank))


def _parts(given: GivenSamples, order: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(order), BATCH):
        yield given.reader.take(order[start : start + BATCH])
