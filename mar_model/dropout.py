"""Dropout with a faster generation of masks on CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 16  # a random 64-bit number gives four mask values of 16 bits each; p is exact to 1 / 2¹⁷


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Set values of x to zero with probability p and divide the others by 1 − p, like `F.dropout`.

    On CPUs, PyTorch (outside of Intel's library) draws masks one value at a time on one thread: 157 million in a step of the base model
    with 4 images, a tenth of the step. This implementation takes an eighth of that. It uses the default generator, like PyTorch.
    """
    if x.device.type != "cpu" or not training or p in (0, 1) or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return x * keep_mask(x.shape, p, x.dtype)


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """A mask on the CPU: zero with probability p, elsewhere the inverse of the kept share."""
    dropped = min(round(p * LEVELS), LEVELS - 1)
    numbers = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = numbers.view(torch.int16)[: shape.numel()] >= dropped - LEVELS // 2
    return kept.to(dtype).mul_(LEVELS / (LEVELS - dropped)).view(shape)


class Dropout(nn.Dropout):
    """`nn.Dropout` that uses `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
