"""A checkpoint of a model in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar_model.checkpoints.checkpoint import AVERAGE, OPTIMIZER, WEIGHTS, optimizer_tensors, write_checkpoint
from mar_model.mar import MAR


def save_checkpoint(
    directory: Path, model: MAR, average: dict[str, Tensor], state: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Make `directory`, and write a checkpoint into it."""
    tensors = {
        WEIGHTS: {name: value.detach().contiguous() for name, value in model.state_dict().items()},
        AVERAGE: {name: value.detach().contiguous() for name, value in average.items()},
        **({} if optimizer is None else {OPTIMIZER: optimizer_tensors(model, optimizer)}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_checkpoint(directory, model.config, tensors, state)
