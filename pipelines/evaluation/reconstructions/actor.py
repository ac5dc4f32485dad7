"""Originals → reconstructions on Ray Data: an actor holds the tokenizer, and keeps the metrics of each pair."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mar_model.tokenizers import Tokenizer, load_tokenizer
from pipelines.evaluation.reconstructions.pixel_metrics import NAMES, lpips_network, pixel_metrics
from pipelines.evaluation.scoring.actor import NotFiniteError
from pipelines.images.pixels import to_model, to_uint8
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import default_device, use_threads
from pipelines.runtime.records import damaged

NAME = re.compile(r"pairs-(\d{9})-(\d{9})\.arrow")
REMEDY = "delete it and run the same command again"
AT_ONCE = 16  # images that go through the tokenizer at a time: its activations are far larger than the features


@dataclass(frozen=True)
class Reconstructing:
    """What an actor needs. `kept`: where the metrics of the pairs go."""

    tokenizer: str
    lpips_weights: str
    cluster: ClusterSettings
    kept: str


class Reconstructor:
    """Replaces the images of a block by their reconstructions from the posterior's means."""

    def __init__(self, job: Reconstructing) -> None:
        use_threads(job.cluster)
        self.job = job

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(storage.local_directory(self.job.tokenizer)).to(default_device())

    @cached_property
    def lpips(self) -> Any:
        return lpips_network(self.job.lpips_weights).to(default_device()) if self.job.lpips_weights else None

    @torch.inference_mode()
    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        originals = block["image"]
        if not len(originals):
            return block
        decoded = torch.cat([self._decoded(part) for part in to_model(originals).split(AT_ONCE)])
        finite = decoded.isfinite().flatten(1).all(dim=1).cpu().numpy()
        if not finite.all():
            first = int(block["index"][np.argmin(finite)])
            raise NotFiniteError(
                f"the tokenizer {self.job.tokenizer!r} reconstructs {int((~finite).sum())} of {len(finite)} images with values that are "
                f"not finite, the first is image {first}",
                "train it again, with a lower tokenizer.learning_rate",
                number=first,
            )
        reconstructions = to_uint8(decoded)
        values = pixel_metrics(originals, reconstructions, self.lpips)
        _write(self.job.kept, int(block["start"][0]), int(block["stop"][0]), block["index"], values)
        return {**block, "image": reconstructions}

    def _decoded(self, images: torch.Tensor) -> torch.Tensor:
        means = self.tokenizer.moments(images.to(default_device())).chunk(2, dim=1)[0]
        return self.tokenizer.decode(means)


def pairs_there(path: str) -> set[tuple[int, int]]:
    """(start, stop) of the blocks whose metrics are kept below `path`."""
    matches = (NAME.fullmatch(name) for name in storage.list_directory(path))
    return {(int(match[1]), int(match[2])) for match in matches if match}


def read_pairs(path: str, ranges: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """`index` (N,) int64 and each of NAMES (N,) float64 of these blocks. Raises DamagedFileError."""
    parts = [_read(storage.join(path, _file(*one))) for one in ranges]
    nothing = {"index": np.zeros(0, np.int64), **dict.fromkeys(NAMES, np.zeros(0))}
    return {name: np.concatenate([empty, *(part.column(name).to_numpy() for part in parts)]) for name, empty in nothing.items()}


def _read(file: str) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.py_buffer(storage.read_bytes(file))).read_all().select(["index", *NAMES])
    except (pa.ArrowException, LookupError, ValueError) as error:
        raise damaged(file, error, REMEDY) from error


def _write(path: str, start: int, stop: int, index: np.ndarray, values: dict[str, np.ndarray]) -> None:
    table = pa.table({"index": pa.array(index, pa.int64()), **{name: pa.array(values[name], pa.float64()) for name in NAMES}})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    storage.write_bytes(storage.join(path, _file(start, stop)), bytes(sink.getvalue()))


def _file(start: int, stop: int) -> str:
    return f"pairs-{start:09d}-{stop:09d}.arrow"
