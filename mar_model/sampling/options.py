"""Options of generation, shared with the count of its floating-point operations."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mar_model.head.diffusion import annealed_steps, respaced_timesteps
from mar_model.sampling.token_sampler import Sampling

SCHEDULES = ("linear", "constant")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The defaults draw like the release. Raises ValueError for an invalid value, with the option, the value found and the value
    expected.

    ar_steps: autoregressive steps; diffusion_steps: denoising steps of each token.
    guidance: scale s of classifier-free guidance, noise = uncond + s·(cond − uncond); with the schedule *linear* it grows from 1 to s as
        the image fills.
    sampler: *ancestral*, as published, or *ddim* with its `eta` (`Diffusion.ddim_step`). temperature: factor on the sampler's noise.
    x0_range: bounds per channel, two (C,) tensors in normalized units, to which predicted clean tokens are clamped (None: as published).

    Fast modes: with `diffusion_steps_end` the diffusion steps decrease linearly over the AR steps (`annealed_steps`), and each token uses
    the first entries of its noise. `guidance_interval` guides only in a part of the noise schedule (`Sampling`). After each complete AR
    step, `reuse_steps` AR steps reuse features (`FeatureReuse`).
    """

    ar_steps: int = 64
    diffusion_steps: int = 100
    diffusion_steps_end: int | None = None
    guidance: float = 1.0
    guidance_schedule: str = "linear"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 1.0
    sampler: str = "ancestral"
    eta: float = 0.0
    x0_range: tuple[Tensor, Tensor] | None = None
    reuse_steps: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}, expected a finite number")
        if self.guidance_schedule not in SCHEDULES:
            raise ValueError(f"guidance_schedule is {self.guidance_schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.reuse_steps < 0:
            raise ValueError(f"reuse_steps is {self.reuse_steps}, expected 0 or more")
        respaced_timesteps(self.diffusion_steps)  # raises for an invalid number of steps
        _ = self.sampling, self.steps

    @property
    def sampling(self) -> Sampling:
        """The settings of the token sampler."""
        return Sampling(self.sampler, self.eta, self.temperature, self.guidance_interval)

    @property
    def steps(self) -> list[int]:
        """Diffusion steps of each AR step."""
        last = self.diffusion_steps if self.diffusion_steps_end is None else self.diffusion_steps_end
        return annealed_steps(self.diffusion_steps, last, self.ar_steps)

    def scale(self, masked: int, tokens: int) -> float:
        """The guidance scale of an AR step that leaves `masked` of `tokens` tokens masked (the last step counts as leaving one)."""
        return self.guidance if self.guidance_schedule == "constant" else 1 + (self.guidance - 1) * (tokens - masked) / tokens


class Completion(NamedTuple):
    """A completion. Of the latents `known` (B, C, H, W) float32, the tokens where `fill`, (B, L) or (B, h, w) bool, is true are drawn,
    equally many per image; the others are returned bit for bit."""

    known: Tensor
    fill: Tensor


PUBLISHED = GenerationOptions()
