"""How several workers hold one model: each the whole of it (DDP), or each its part of every tensor (FSDP2)."""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mar_model.checkpoint import describe_misfit, shapes_of
from mar_model.mar import MAR


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


class Sharded:
    """Every worker holds its part of each tensor; the blocks are gathered as they run (FSDP2's `fully_shard`).

    In bf16 the blocks' weights travel and compute in bf16 and their gradients are summed in float32; activations keep the types that
    autocast gives them, so that the step is that of `Replicated`.
    """

    sharded = True

    def __init__(self, model: MAR, workers: int, device: torch.device, precision: str) -> None:
        # PyTorch's sharding takes a second to import: replicated workers, and what else imports this page, go without
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import DTensor, distribute_tensor

        self._sharded_tensor, self._distribute = DTensor, distribute_tensor
        mesh = init_device_mesh(device.type, (workers,))
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = bf16 if precision == "bf16" else MixedPrecisionPolicy()
        for block in (*model.encoder_blocks, *model.decoder_blocks, *model.diffloss.net.res_blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        self.module: nn.Module = model

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        """Every worker must ask for the same tensors in the same order."""
        return tensor.full_tensor() if isinstance(tensor, self._sharded_tensor) else tensor  # type: ignore[no-any-return, no-untyped-call]

    def place(self, whole: Tensor, beside: Tensor) -> Tensor:
        if not isinstance(beside, self._sharded_tensor):
            return whole.to(beside.device)
        return self._distribute(whole.to(beside.device), beside.device_mesh, beside.placements, src_data_rank=None)

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [one.to_local() if isinstance(one, self._sharded_tensor) else one for one in tensors]


Strategy = Replicated | Sharded


def strategy_of(name: Literal["ddp", "fsdp"], model: MAR, workers: int, device: torch.device, precision: str) -> Strategy:
    """A model on one worker is whole, whatever the strategy. Optimizer and averages are to be made of the model afterwards."""
    return Sharded(model, workers, device, precision) if name == "fsdp" and workers > 1 else Replicated(model, workers)


@torch.no_grad()
def load_whole(strategy: Strategy, targets: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into parameters or averages of the same names. Raises ValueError where names or shapes differ."""
    misfit = describe_misfit(shapes_of(targets), shapes_of(whole))
    if misfit:
        raise ValueError(f"weights don't fit the model: {misfit}")
    for name, target in targets.items():
        target.copy_(strategy.place(whole[name], target))
