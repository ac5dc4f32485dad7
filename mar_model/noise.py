"""Where every random number comes from: streams named by what they are for, never a global generator.

A stream is a function of its name alone (a seed, counts, a purpose), so a resumed run continues the same stream, and a
sample is the same whichever worker draws it.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


def stream(seed: int, *names: int | str) -> torch.Generator:
    """The generator (on the CPU) of the stream `seed, names…`; equal names give equal draws on every machine."""
    key = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


class Noise(Protocol):
    """What generation asks for: `generate` takes any object of this shape, so a recorded stream can be replayed."""

    def orders(self, tokens: int) -> Tensor:
        """Generation order of each image, (B, tokens) int64: a permutation a row."""

    def tokens(self, step: int, predicted: Tensor, diffusion_steps: int, dim: int) -> Tensor:
        """Noise for the tokens that AR step `step` predicts: (1 + diffusion_steps, rows, dim) float32.

        `predicted` is a (B, tokens) bool mask with `rows` true entries, taken image by image and inside an image by position.
        Entry 0 is the initial noise, then one entry per diffusion step from the noisiest down.
        """


class SampleNoise:
    """Noise of sample i as a function of (seed, i, token): whatever batch or worker draws it, and at whatever AR step."""

    def __init__(self, seed: int, samples: Sequence[int]) -> None:
        self.seed = seed
        self.samples = [int(one) for one in samples]
        self._drawn: Tensor | None = None

    def orders(self, tokens: int) -> Tensor:
        return torch.stack([torch.randperm(tokens, generator=stream(self.seed, "order", one)) for one in self.samples])

    def tokens(self, step: int, predicted: Tensor, diffusion_steps: int, dim: int) -> Tensor:
        length = predicted.shape[1]
        if self._drawn is None or self._drawn.shape[1:] != (length, 1 + diffusion_steps, dim):
            self._drawn = torch.stack(
                [torch.randn(length, 1 + diffusion_steps, dim, generator=stream(self.seed, "token", one)) for one in self.samples]
            )
        return self._drawn[predicted.cpu()].transpose(0, 1).contiguous()
