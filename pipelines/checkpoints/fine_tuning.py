"""Fine-tuning: a run that begins with the averaged weights of a checkpoint, on a cache that may have other classes."""

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

CLASSES = "class_emb.weight"  # (classes, width): a row a class


@dataclass(frozen=True)
class Start:
    """What a run begins with: a checkpoint, the tensors of it that fit, and where each class of the cache is found there."""

    path: str
    digest: str  # of its averaged weights
    kept: tuple[str, ...]
    anew: tuple[str, ...]
    classes: tuple[tuple[int, int], ...]  # (row here, row there)

    def weights(self, model: MAR) -> dict[str, Tensor]:
        """The model's whole weights: its own, but for those that are kept."""
        found = read_tensors(storage.local_directory(self.path) / AVERAGE)
        whole = {name: value.detach().clone() for name, value in model.state_dict().items()}
        for name in self.kept:
            whole[name] = found[name].to(torch.float32)
        here, there = ([pair[side] for pair in self.classes] for side in (0, 1))
        if CLASSES not in self.kept and here:
            whole[CLASSES][here] = found[CLASSES][there].to(whole[CLASSES])
        return whole

    def describe(self, class_names: Sequence[str]) -> list[str]:
        """What is kept and what starts anew, in lines for the person."""
        lines = [f"begins with the averaged weights of {self.path}: {len(self.kept)} of {len(self.kept) + len(self.anew)} tensors kept"]
        if CLASSES not in self.kept:
            known = [class_names[here] for here, _ in self.classes]
            new = len(class_names) - len(known)
            lines.append(f"classes: {len(known)} known there by name{_some(known)}, {new} start anew")
        others = [name for name in self.anew if name != CLASSES]
        if others:
            lines.append(f"of another shape, or not there, and so started anew: {_some(others)[2:]}")
        return [
            *lines,
            "started anew: optimizer, averages, images seen, the schedule; latents are normalised as this cache says",
        ]


def start_from(path: str, config: MARConfig, class_names: Sequence[str]) -> Start:
    """Compare the checkpoint directory `path`, which `train.init_from` names, with the model that is to be trained.

    Raises UserError for a damaged checkpoint, and for one of which nothing but the classes' rows would fit.
    """
    directory = storage.local_directory(path)
    try:
        state = read_checkpoint(path, Weights)
    except ValueError as error:
        raise UserError(f"train.init_from: {error}", remedy=ANOTHER_CHECKPOINT) from error
    with torch.device("meta"):
        expected = shapes_of(MAR(config).state_dict())
    found = shapes_of(read_tensors(directory / AVERAGE))
    names_there = state.get("class_names") or []
    same_classes = expected[CLASSES] == found.get(CLASSES) and (not names_there or list(names_there) == list(class_names))
    kept = tuple(name for name in expected if expected[name] == found.get(name) and (name != CLASSES or same_classes))
    anew = tuple(name for name in expected if name not in kept)
    if not any(name.startswith(("encoder_blocks.", "decoder_blocks.")) for name in kept):
        raise UserError(
            f"train.init_from: none of the blocks in {path} has the shape of this model's ({_blocks(expected)}, there "
            f"{_blocks(found)}); expected a checkpoint of the same section model"
        )
    rows = {name: row for row, name in enumerate(names_there)}
    same_width = found.get(CLASSES, (0, 0))[1:] == expected[CLASSES][1:]
    classes = tuple((here, rows[name]) for here, name in enumerate(class_names) if name in rows) if same_width else ()
    return Start(path, state["files"][AVERAGE], kept, anew, classes)


def _blocks(shapes: Shapes) -> str:
    blocks = {name.split(".")[1] for name in shapes if name.startswith("encoder_blocks.")}
    width = shapes.get("encoder_pos_embed_learned", (0, 0, 0))[-1]
    return f"{len(blocks)} encoder blocks of width {width}"


def _some(names: Sequence[str], shown: int = 4) -> str:
    """`: a, b, …`, or nothing for none."""
    return f": {', '.join(names[:shown])}{' …' if len(names) > shown else ''}" if names else ""
