"""The source of all random numbers: streams named by seed and purpose, never a global generator.

A stream is a function of its name alone (a seed, counts, a purpose), so a resumed run continues the same stream, and a
sample is the same on any worker.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


def stream(seed: int, *names: int | str) -> torch.Generator:
    """The CPU generator of the stream `seed, names…`. Equal names give equal draws on every machine."""
    key = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


class Noise(Protocol):
    """The noise that `generate` uses. Any object with these methods works, so recorded noise can be replayed."""

    def orders(self, tokens: int) -> Tensor:
        """Generation order of each image, (B, tokens) int64: one permutation per row."""

    def tokens(self, step: int, predicted: Tensor, diffusion_steps: int, dim: int) -> Tensor:
        """Noise for the tokens that AR step `step` predicts: (1 + diffusion_steps, rows, dim) float32.

        `predicted` is a (B, tokens) bool mask on the CPU with `rows` true entries, in row-major order. Entry 0 is the initial noise,
        followed by one entry per diffusion step from the noisiest down.
        """


class SampleNoise:
    """Noise of sample i as a function of (seed, i, token), independent of batch, worker and AR step.

    It is drawn on the CPU for all tokens at the first use, and kept on `device`.
    """

    def __init__(self, seed: int, samples: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.samples = [int(one) for one in samples]
        self.device = torch.device(device)
        self._drawn: Tensor | None = None

    def orders(self, tokens: int) -> Tensor:
        return torch.stack([torch.randperm(tokens, generator=stream(self.seed, "order", one)) for one in self.samples])

    def tokens(self, step: int, predicted: Tensor, diffusion_steps: int, dim: int) -> Tensor:
        shape = (*predicted.shape, 1 + diffusion_steps, dim)
        if self._drawn is None or self._drawn.shape != shape:
            drawn = torch.empty(shape, pin_memory=self.device.type == "cuda")
            for one, noise in zip(self.samples, drawn, strict=True):
                noise.normal_(generator=stream(self.seed, "token", one))
            self._drawn = drawn.to(self.device, non_blocking=True)
        rows = to_device(predicted.flatten().nonzero().flatten(), self.device)
        return self._drawn.flatten(0, 1).index_select(0, rows).transpose(0, 1).contiguous()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without synchronising host and device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
