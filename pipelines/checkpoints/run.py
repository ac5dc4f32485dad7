"""A training run as its checkpoints see it, and which of them it keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mar_model.config import MARConfig


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run are kept beside the newest."""

    kept: int  # the newest ones
    every_images: int = 0  # the first of every so many images, permanently; 0: none
    best_metric: str = ""  # the one where this metric was lowest; empty: none
    validated_as: str = ""  # identity of the validations whose metrics count


@dataclass(frozen=True)
class CheckpointedRun:
    """A training run as its checkpoints see it."""

    path: str  # the checkpoints go to PATH/checkpoints
    model: MARConfig
    about: Mapping[str, Any]  # the fields of `state.json` that stay the same over the run: seed, settings, tokenizer, classes, …
    retention: Retention
