"""Fine-tuning: a run starts from the averaged weights of a checkpoint, on a cache that may have other classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mar_model.checkpoints.checkpoint import AVERAGE
from mar_model.config import MARConfig
from mar_model.files import Shapes, read_tensors, shapes_of
from mar_model.mar import MAR
from pipelines.checkpoints.directory import ANOTHER_CHECKPOINT, Weights, read_checkpoint
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

CLASSES = "class_emb.weight"  # (classes, width): one row per class


@dataclass(frozen=True)
class Start:
    """Initial weights of a run: a checkpoint, its tensors that fit, and the rows of its class embedding for the cache's classes."""

    path: str
    digest: str  # of its averaged weights
    kept: tuple[str, ...]
    initialized: tuple[str, ...]  # tensors that are initialized
    classes: tuple[tuple[int, int], ...]  # (row in the new model, row in the checkpoint)

    def weights(self, model: MAR) -> dict[str, Tensor]:
        """All weights of the model: the kept tensors from the checkpoint, the others as initialized."""
        found = read_tensors(storage.local_directory(self.path) / AVERAGE)
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        for name in self.kept:
            weights[name] = found[name].to(torch.float32)
        new_rows, old_rows = ([pair[side] for pair in self.classes] for side in (0, 1))
        if CLASSES not in self.kept and new_rows:
            weights[CLASSES][new_rows] = found[CLASSES][old_rows].to(weights[CLASSES])
        return weights

    def describe(self, class_names: Sequence[str]) -> list[str]:
        """Lines for the user: which weights are kept and which are initialized."""
        lines = [
            f"starts from the averaged weights of {self.path}: {len(self.kept)} of {len(self.kept) + len(self.initialized)} tensors kept"
        ]
        if CLASSES not in self.kept:
            known = [class_names[row] for row, _ in self.classes]
            new = len(class_names) - len(known)
            lines.append(f"classes: {len(known)} found in the checkpoint by name{_some(known)}; {new} initialized")
        others = [name for name in self.initialized if name != CLASSES]
        if others:
            lines.append(f"initialized, because missing in the checkpoint or of another shape: {_some(others)[2:]}")
        return [
            *lines,
            "not taken over: optimizer, averages, images seen, learning-rate schedule; latents are normalised with this cache's statistics",
        ]


def start_from(path: str, config: MARConfig, class_names: Sequence[str]) -> Start:
    """Compare the checkpoint directory `path` (setting `train.init_from`) with the model to be trained.

    Raises UserError for a damaged checkpoint, and for a checkpoint without a fitting transformer block.
    """
    directory = storage.local_directory(path)
    try:
        state = read_checkpoint(path, Weights)
    except ValueError as error:
        raise UserError(f"train.init_from: {error}", remedy=ANOTHER_CHECKPOINT) from error
    with torch.device("meta"):
        expected = shapes_of(MAR(config).state_dict())
    found = shapes_of(read_tensors(directory / AVERAGE))
    old_names = state.get("class_names") or []
    same_classes = expected[CLASSES] == found.get(CLASSES) and (not old_names or list(old_names) == list(class_names))
    kept = tuple(name for name in expected if expected[name] == found.get(name) and (name != CLASSES or same_classes))
    initialized = tuple(name for name in expected if name not in kept)
    if not any(name.startswith(("encoder_blocks.", "decoder_blocks.")) for name in kept):
        raise UserError(
            f"train.init_from: no block in {path} has the shape of this model's blocks (found {_blocks(found)}, expected "
            f"{_blocks(expected)})",
            remedy="use a checkpoint with the same settings in section model",
        )
    rows = {name: row for row, name in enumerate(old_names)}
    same_width = found.get(CLASSES, (0, 0))[1:] == expected[CLASSES][1:]
    classes = tuple((row, rows[name]) for row, name in enumerate(class_names) if name in rows) if same_width else ()
    return Start(path, state["files"][AVERAGE], kept, initialized, classes)


def _blocks(shapes: Shapes) -> str:
    blocks = {name.split(".")[1] for name in shapes if name.startswith("encoder_blocks.")}
    width = shapes.get("encoder_pos_embed_learned", (0, 0, 0))[-1]
    return f"{len(blocks)} encoder blocks of width {width}"


def _some(names: Sequence[str], shown: int = 4) -> str:
    """`: a, b, …`; empty if there are no names."""
    return f": {', '.join(names[:shown])}{' …' if len(names) > shown else ''}" if names else ""
