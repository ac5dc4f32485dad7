"""Reconstruction terms per pixel value, and the negative log-likelihood with a learned variance."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of a tokenizer's loss; 0 leaves a term out."""

    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 0.0
    kl: float = 0.0
    quantizer: float = 1.0


def pixel_error(reconstructions: Tensor, images: Tensor, l1: float, l2: float) -> Tensor:
    """l1·|x̂ − x| + l2·(x̂ − x)² of every pixel value: two (B, 3, H, W) in [-1, 1] → (B, 3, H, W)."""
    difference = reconstructions - images
    error = torch.zeros_like(difference)
    if l1:
        error = error + l1 * difference.abs()
    if l2:
        error = error + l2 * difference.square()
    return error


class LearnedVariance(nn.Module):
    """The negative log-likelihood of Laplace-like errors with one learned log-variance for all pixels, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, error: Tensor) -> Tensor:
        """error / exp(s) + s, for each value."""
        return error / self.log_variance.exp() + self.log_variance
