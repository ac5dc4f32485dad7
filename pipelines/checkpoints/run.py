"""A training run from the perspective of its checkpoints, and their retention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mar_model.config import MARConfig


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run are kept in addition to the newest."""

    kept: int  # number of newest checkpoints
    every_images: int = 0  # keep the first checkpoint after every so many images permanently; 0: none
    best_metric: str = ""  # keep the checkpoint with the lowest value of this metric; empty: none
    validated_as: str = ""  # identity of the validations that count


@dataclass(frozen=True)
class CheckpointedRun:
    """A training run from the perspective of its checkpoints."""

    path: str  # checkpoints are written to PATH/checkpoints
    model: MARConfig
    about: Mapping[str, Any]  # fields of `state.json` that are constant in the run: seed, settings, tokenizer, classes, …
    retention: Retention
