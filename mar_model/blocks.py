"""What the transformer's and the denoiser's blocks share: how one is run, and the epsilon of their normalization."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6


def run(block: nn.Module, *inputs: Tensor | None, recompute: bool) -> Tensor:
    """The block's output. With `recompute` its activations are not kept for the backward pass but computed again there, with the same
    dropout: a third more arithmetic for a fraction of the memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    return block(*inputs)  # type: ignore[no-any-return]
