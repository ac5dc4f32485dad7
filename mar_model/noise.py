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

        `predicted` is a (B, tokens) bool mask on the CPU with `rows` true entries, taken image by image and inside an image by position.
        Entry 0 is the initial noise, then one entry per diffusion step from the noisiest down.
        """


class SampleNoise:
    """Noise of sample i as a function of (seed, i, token): whatever batch or worker draws it, and at whatever AR step.

    It is drawn on the CPU, at the first use and for all tokens, and kept on `device`.
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
    """`tensor` on `device`, without making the host wait for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
