"""How several workers hold one model: each the whole of it (DDP), or each its part of every tensor (FSDP2)."""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mar_model.files import describe_misfit, shapes_of
from mar_model.mar import MAR

if TYPE_CHECKING:
    from mar_model.training.sharding import Sharded


class Replicated:
    """Every worker holds the whole model; gradients are averaged over the workers while the last micro-batch runs backward."""

    sharded = False

    def __init__(self, model: MAR, workers: int) -> None:
        self.module: nn.Module = DistributedDataParallel(model, gradient_as_bucket_view=True) if workers > 1 else model

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward pass; gradients travel in the last one alone."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def whole(self, tensor: Tensor) -> Tensor:
        """The whole of a parameter, or of what is kept beside one."""
        return tensor

    def place(self, whole: Tensor, beside: Tensor) -> Tensor:
        """`whole` as this worker keeps it beside the parameter."""
        return whole.to(beside.device)

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What this worker itself holds of the tensors."""
        return list(tensors)


Strategy: TypeAlias = "Replicated | Sharded"


def strategy_of(name: Literal["ddp", "fsdp"], model: MAR, workers: int, device: torch.device, precision: str) -> Strategy:
    """A model on one worker is whole, whatever the strategy. Optimizer and averages are to be made of the model afterwards."""
    if name == "ddp" or workers == 1:
        return Replicated(model, workers)
    from mar_model.training.sharding import Sharded  # PyTorch's sharding takes a second to import: those who don't shard go without

    return Sharded(model, workers, device, precision)


@torch.no_grad()
def load_whole(strategy: Strategy, targets: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into parameters or averages of the same names. Raises ValueError where names or shapes differ."""
    misfit = describe_misfit(shapes_of(targets), shapes_of(whole))
    if misfit:
        raise ValueError(f"weights don't fit the model: {misfit}")
    for name, target in targets.items():
        target.copy_(strategy.place(whole[name], target))
