"""How workers hold a model: replicated (DDP) or sharded (FSDP2)."""

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
    """Every worker holds the whole model. Gradients are averaged over the workers during the backward pass of the last micro-batch."""

    sharded = False

    def __init__(self, model: MAR, workers: int) -> None:
        self.module: nn.Module = DistributedDataParallel(model, gradient_as_bucket_view=True) if workers > 1 else model

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """A context manager for one forward and backward pass. Gradients are synchronised only in the last one of a step."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor of a parameter, or of a state with the same layout."""
        return tensor

    def place(self, whole: Tensor, beside: Tensor) -> Tensor:
        """`whole` in the layout of `beside` on this worker."""
        return whole.to(beside.device)

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This worker's local tensors."""
        return list(tensors)


Strategy: TypeAlias = "Replicated | Sharded"


def strategy_of(name: Literal["ddp", "fsdp"], model: MAR, workers: int, device: torch.device, precision: str) -> Strategy:
    """The strategy `name`; on one worker always `Replicated`. Create optimizer and averages after this call."""
    if name == "ddp" or workers == 1:
        return Replicated(model, workers)
    from mar_model.training.sharding import Sharded  # here, because importing PyTorch's sharding takes a second

    return Sharded(model, workers, device, precision)


@torch.no_grad()
def load_whole(strategy: Strategy, targets: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy full tensors into parameters or averages of the same names. Raises ValueError if names or shapes differ."""
    misfit = describe_misfit(shapes_of(targets), shapes_of(whole))
    if misfit:
        raise ValueError(f"weights don't fit the model: {misfit}")
    for name, target in targets.items():
        target.copy_(strategy.place(whole[name], target))
