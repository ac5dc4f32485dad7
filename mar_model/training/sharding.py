"""A model with sharded tensors: FSDP2, PyTorch's `fully_shard`."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mar_model.mar import MAR


class Sharded:
    """Every worker holds a shard of each tensor; blocks are gathered when they run (FSDP2's `fully_shard`).

    In bf16 the blocks' weights are gathered and used in bf16, and their gradients are reduced in float32. Activations keep the dtypes of
    autocast, so a step is the same as with `Replicated`.
    """

    sharded = True

    def __init__(self, model: MAR, workers: int, device: torch.device, precision: str) -> None:
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
        """See `Replicated.whole`. All workers must call it for the same tensors in the same order."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def place(self, whole: Tensor, beside: Tensor) -> Tensor:
        if not isinstance(beside, DTensor):
            return whole.to(beside.device)
        return distribute_tensor(whole.to(beside.device), beside.device_mesh, beside.placements, src_data_rank=None)

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
