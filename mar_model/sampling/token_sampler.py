"""The denoiser's sampling loop: one token per condition by ancestral or DDIM sampling (arXiv 2406.11838, section 3.2), eager or as a
captured CUDA graph."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mar_model.head.denoiser import Denoiser
from mar_model.head.diffusion import TRAINING_STEPS, Diffusion, respaced_timesteps

SAMPLERS = ("ancestral", "ddim")
Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sampling:
    """Settings of the token sampler. Raises ValueError for invalid values."""

    sampler: str = "ancestral"  # ancestral (learned variance, as published) or ddim (arXiv 2010.02502)
    eta: float = 0.0  # ddim: 0 adds no noise, 1 as much as the posterior has
    temperature: float = 1.0  # factor on the noise added at every step
    # Guidance only between these shares of the noise schedule (0: clean, 1: pure noise), arXiv 2404.07724, "Applying Guidance in a
    # Limited Interval Improves Sample and Distribution Quality": outside, the unconditional half is not computed.
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}, expected one of {', '.join(SAMPLERS)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}, expected 0 to 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval is {self.guidance_interval}, expected two shares, 0 ≤ low ≤ high ≤ 1")

    def guides(self, timestep: int) -> bool:
        """Whether a step at this training timestep (0…999) is guided."""
        low, high = self.guidance_interval
        return low <= timestep / (TRAINING_STEPS - 1) <= high


PUBLISHED = Sampling()


def sample_tokens(
    denoiser: Denoiser,
    diffusion: Diffusion,
    z: Tensor,
    noise: Tensor,
    *,
    guidance: float | Tensor | None = None,
    temperature: float = 1.0,
    x0_range: Range | None = None,
) -> Tensor:
    """Draw one token per condition by ancestral sampling: (N, D) float32. Arguments as in `draw_tokens`."""
    return draw_tokens(denoiser, diffusion, z, noise, Sampling(temperature=temperature), guidance, x0_range)


@torch.no_grad()
def draw_tokens(
    denoiser: Denoiser,
    diffusion: Diffusion,
    z: Tensor,
    noise: Tensor,
    sampling: Sampling = PUBLISHED,
    guidance: float | Tensor | None = None,
    x0_range: Range | None = None,
) -> Tensor:
    """Draw one token per condition: (N, D) float32.

    z is (N, W), or (2N, W) with the unconditional half last if `guidance` (a number or a zero-dimensional tensor) is given. noise is
    (1 + steps, N, D): the initial noise, then one entry per step from the noisiest down. State, schedule and guidance are float32, also
    under autocast. Nothing here synchronises with the device.
    """
    condition = denoiser.cond_embed(z)
    times = denoiser.time_embed(diffusion.timesteps)
    y = torch.empty_like(condition)
    states = noise.new_empty(len(z), noise.shape[2])  # of both halves, which start each guided step with the same state
    rows, steps = noise.shape[1], len(diffusion.visited)
    x = states[:rows].copy_(noise[0])
    for index in reversed(range(steps)):
        scale = guidance if sampling.guides(diffusion.visited[index]) else None
        used = rows if scale is None else 2 * rows
        if scale is not None:
            states[rows:].copy_(x)
        torch.add(times[index], condition[:used], out=y[:used])
        output = denoiser.denoise(states[:used], y[:used]).float()
        predicted_noise, interpolation = output.chunk(2, dim=1)
        if scale is not None:
            conditional, unconditional = predicted_noise.chunk(2)
            predicted_noise = unconditional + scale * (conditional - unconditional)
            interpolation = interpolation[:rows]
        added = noise[steps - index]
        if sampling.sampler == "ddim":
            following = diffusion.ddim_step(x, index, predicted_noise, added, sampling.eta, sampling.temperature, x0_range)
        else:
            following = diffusion.step(x, index, predicted_noise, interpolation, added, sampling.temperature, x0_range)
        x.copy_(following)
    return x


class TokenSampler:
    """`draw_tokens` with cached schedules, weights in `dtype`, and captured loops.

    dtype: use a copy of the denoiser in this precision (later changes of the model's weights have no effect); None uses the denoiser
    itself under the caller's autocast. cuda_graph: capture the loop as a CUDA graph for each number of rows and steps, and replay it.
    These numbers repeat in every batch, so only the first batch captures. Without a CUDA device the loop runs eagerly on the same static
    buffers. Raises ValueError for a graph under the caller's autocast, whose cast weights would not exist any more at replay.
    """

    def __init__(self, denoiser: Denoiser, *, dtype: torch.dtype | None = None, cuda_graph: bool = False) -> None:
        self.denoiser = denoiser
        if dtype is not None:
            self.denoiser = copy.deepcopy(denoiser).to(dtype)
            if denoiser.compiler:  # a copy is not compiled
                for block in self.denoiser.res_blocks:
                    block.compile(dynamic=True, backend=denoiser.compiler)
        self.dtype, self.cuda_graph = dtype, cuda_graph
        self._schedules: dict[tuple[int, torch.device], Diffusion] = {}
        self._loops: dict[Any, _StaticLoop] = {}
        self._memory: Any = None  # one pool for all graphs: each output is copied before the next replay

    def __call__(
        self, z: Tensor, noise: Tensor, sampling: Sampling = PUBLISHED, guidance: float | None = None, x0_range: Range | None = None
    ) -> Tensor:
        """One token per condition, (N, D) float32; arguments as in `draw_tokens`."""
        if not self.cuda_graph:
            return self._draw(z, noise, sampling, guidance, x0_range)
        if self.dtype is None and torch.is_autocast_enabled(z.device.type):
            raise ValueError("a CUDA graph cannot be captured under autocast; set the dtype of TokenSampler instead")
        key = (z.shape, z.dtype, noise.shape, sampling, guidance is None, x0_range is None)
        if key not in self._loops:
            if z.device.type == "cuda" and self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            self._loops[key] = _StaticLoop(self._draw, z, noise, sampling, guidance, x0_range, self._memory)
        return self._loops[key](z, noise, guidance, x0_range)

    def schedule(self, steps: int, device: torch.device) -> Diffusion:
        """The schedule of `steps` steps on the device. Calling this in advance avoids a copy during sampling. Raises ValueError as
        `respaced_timesteps` does."""
        if (steps, device) not in self._schedules:
            self._schedules[steps, device] = Diffusion(respaced_timesteps(steps)).to(device)
        return self._schedules[steps, device]

    def _draw(self, z: Tensor, noise: Tensor, sampling: Sampling, guidance: float | Tensor | None, x0_range: Range | None) -> Tensor:
        schedule = self.schedule(noise.shape[0] - 1, z.device)
        with self._precision(z.device):
            return draw_tokens(self.denoiser, schedule, z, noise, sampling, guidance, x0_range)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()
        # the weights are already in dtype; autocast casts the inputs. Its cache is not needed and must not outlive a capture
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)


class _StaticLoop:
    """A loop on static buffers, whose addresses a CUDA graph can use."""

    def __init__(
        self,
        draw: Callable[..., Tensor],
        z: Tensor,
        noise: Tensor,
        sampling: Sampling,
        guidance: float | None,
        x0_range: Range | None,
        memory: Any,
    ) -> None:
        with torch.inference_mode(False):  # so that the tensors can be written in and outside inference mode
            self.z, self.noise = torch.empty_like(z), torch.empty_like(noise)
            self.guidance = None if guidance is None else torch.empty((), dtype=torch.float32, device=z.device)
            self.x0_range = None if x0_range is None else (torch.empty_like(x0_range[0]), torch.empty_like(x0_range[1]))
        self._draw, self._sampling = draw, sampling
        self._graph: torch.cuda.CUDAGraph | None = None
        if z.device.type == "cuda":
            self._fill(z, noise, guidance, x0_range)
            self._capture(memory)

    def __call__(self, z: Tensor, noise: Tensor, guidance: float | None, x0_range: Range | None) -> Tensor:
        self._fill(z, noise, guidance, x0_range)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._drawn.clone()  # the next replay overwrites it

    def _fill(self, z: Tensor, noise: Tensor, guidance: float | None, x0_range: Range | None) -> None:
        self.z.copy_(z)
        self.noise.copy_(noise)
        if self.guidance is not None:
            self.guidance.fill_(guidance)  # type: ignore[arg-type]
        if self.x0_range is not None and x0_range is not None:
            for own, given in zip(self.x0_range, x0_range, strict=True):
                own.copy_(given)

    def _run(self) -> Tensor:
        return self._draw(self.z, self.noise, self._sampling, self.guidance, self.x0_range)

    def _capture(self, memory: Any) -> None:
        """Warm up on a side stream, so that libraries initialise, then capture (see "CUDA semantics" in PyTorch's documentation)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._drawn = self._run()
