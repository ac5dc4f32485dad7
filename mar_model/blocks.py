"""Shared by the blocks of transformer and denoiser: running a block with or without recomputation, and the epsilon of the norms."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6


def run(block: nn.Module, *inputs: Tensor | None, recompute: bool) -> Tensor:
    """The block's output. With `recompute`, activations are not stored for the backward pass but computed again, with the same dropout:
    a third more arithmetic for a fraction of the memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    return block(*inputs)  # type: ignore[no-any-return]
