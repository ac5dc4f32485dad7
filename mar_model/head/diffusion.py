"""Gaussian diffusion of one token: the schedule, the training loss, and ancestral and DDIM steps.

The process is that of "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672): cosine schedule (eq. 17), predicted
noise, and a learned variance interpolated between its two bounds (eq. 15), trained with MSE + variational bound as MAR does
(arXiv 2406.11838, section 3.2).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

TRAINING_STEPS = 1000
LN2 = math.log(2.0)


class TokenLoss(NamedTuple):
    """Losses of N tokens, each (N,) float32: `total` = `mse` + `bound` (the variational bound in bits per dimension)."""

    total: Tensor
    mse: Tensor
    bound: Tensor


def cosine_betas(steps: int = TRAINING_STEPS) -> Tensor:
    """β_t of ᾱ(t) = cos²((t + 0.008)/1.008 · π/2), at most 0.999; (steps,) float64."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def respaced_timesteps(steps: int) -> list[int]:
    """The training timesteps that sampling with `steps` steps visits, ascending: round(i · 999/(steps − 1)), halves to even.

    Raises ValueError outside 1…1000.
    """
    if not 1 <= steps <= TRAINING_STEPS:
        raise ValueError(f"diffusion_steps is {steps}, expected 1 to {TRAINING_STEPS}")
    if steps == 1:
        return [0]
    return [round(i * (TRAINING_STEPS - 1) / (steps - 1)) for i in range(steps)]


def annealed_steps(first: int, last: int, ar_steps: int) -> list[int]:
    """Diffusion steps of each autoregressive step, falling linearly from `first` to `last`.

    "DiSA: Diffusion Step Annealing in Autoregressive Image Generation" (arXiv 2505.20297, the linear schedule; there 50 to 5): the more
    of an image is known, the narrower is the distribution of a token. Raises ValueError if `last` is below 1 or above `first`.
    """
    if not 1 <= last <= first:
        raise ValueError(f"diffusion_steps_end is {last}, expected 1 to diffusion_steps, which is {first}")
    return [round(first + (last - first) * step / max(ar_steps - 1, 1)) for step in range(ar_steps)]


class Schedule(NamedTuple):
    """Coefficients at some timesteps, each a tensor of their shape. ᾱ' is ᾱ at the next visited timestep, and 1 after the last."""

    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    sqrt_recip_alpha_bar: Tensor
    sqrt_recip_alpha_bar_minus_one: Tensor
    x0_coefficient: Tensor  # of the posterior's mean
    xt_coefficient: Tensor
    min_log_variance: Tensor  # of the posterior; at t = 0, where it is undefined, its value at t = 1
    max_log_variance: Tensor  # log β
    sqrt_next_alpha_bar: Tensor  # √ᾱ'
    one_minus_next_alpha_bar: Tensor  # 1 − ᾱ'
    posterior_variance: Tensor  # zero at t = 0


class Diffusion(nn.Module):
    """The schedule over the given training timesteps (all by default), as one float32 table (columns of `Schedule`, steps)."""

    timesteps: Tensor
    table: Tensor

    def __init__(self, timesteps: list[int] | None = None) -> None:
        super().__init__()
        self.visited = timesteps if timesteps is not None else list(range(TRAINING_STEPS))  # on the host
        chosen = torch.tensor(self.visited)
        alpha_bar = torch.cumprod(1 - cosine_betas(), dim=0)[chosen]
        following = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        betas = 1 - alpha_bar / following
        variance = betas * (1 - following) / (1 - alpha_bar)
        bound = variance.clone()
        if len(chosen) > 1:
            bound[0] = variance[1]
        schedule = Schedule(
            sqrt_alpha_bar=alpha_bar.sqrt(),
            sqrt_one_minus_alpha_bar=(1 - alpha_bar).sqrt(),
            sqrt_recip_alpha_bar=alpha_bar.rsqrt(),
            sqrt_recip_alpha_bar_minus_one=(1 / alpha_bar - 1).sqrt(),
            x0_coefficient=betas * following.sqrt() / (1 - alpha_bar),
            xt_coefficient=(1 - following) * (1 - betas).sqrt() / (1 - alpha_bar),
            min_log_variance=bound.clamp(min=1e-20).log(),
            max_log_variance=betas.log(),
            sqrt_next_alpha_bar=following.sqrt(),
            one_minus_next_alpha_bar=1 - following,
            posterior_variance=variance,
        )
        self.register_buffer("timesteps", chosen, persistent=False)
        self.register_buffer("table", torch.stack(schedule).float(), persistent=False)

    def at(self, t: Tensor) -> Schedule:
        """The schedule at indices t (N,), as columns (N, 1)."""
        return Schedule(*self.table[:, t, None])

    def at_step(self, index: int) -> Schedule:
        """The schedule at one index, as zero-dimensional views of the table."""
        return Schedule(*self.table[:, index])

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0): (N, D) at schedule indices t (N,)."""
        now = self.at(t)
        return now.sqrt_alpha_bar * x0 + now.sqrt_one_minus_alpha_bar * noise

    def loss(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> TokenLoss:
        """Loss of the denoiser's output (N, 2D) for clean tokens x0 noised to xt at t (N,) with `noise` (N, D)."""
        predicted_noise, interpolation = output.float().chunk(2, dim=1)
        mse = (predicted_noise - noise).square().mean(dim=1)

        now = self.at(t)
        log_variance = _log_variance(now, interpolation)
        mean = _posterior_mean(now, _clean(now, xt, predicted_noise.detach()), xt)
        true_mean, true_log_variance = _posterior_mean(now, x0, xt), now.min_log_variance
        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1.0
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
        )
        likelihood = discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, -likelihood.mean(dim=1), kl.mean(dim=1)) / LN2
        return TokenLoss(mse + bound, mse, bound)

    def step(
        self,
        x: Tensor,
        index: int,
        predicted_noise: Tensor,
        interpolation: Tensor,
        noise: Tensor,
        temperature: float = 1.0,
        x0_range: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One ancestral step x_t → x_{t−1}, (N, D) float32, at schedule index `index`; `temperature` multiplies the added noise.

        `x0_range` (two (D,) tensors) clamps the predicted clean token; without it the step is as published.
        """
        now = self.at_step(index)
        x0 = _clean(now, x, predicted_noise)
        if x0_range is not None:
            x0 = torch.clamp(x0, *x0_range)
        mean = _posterior_mean(now, x0, x)
        if index == 0:
            return mean
        return mean + torch.exp(0.5 * _log_variance(now, interpolation)) * noise * temperature

    def ddim_step(
        self,
        x: Tensor,
        index: int,
        predicted_noise: Tensor,
        noise: Tensor,
        eta: float = 0.0,
        temperature: float = 1.0,
        x0_range: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One step of "Denoising Diffusion Implicit Models" (arXiv 2010.02502, eq. 12), (N, D) float32, at schedule index `index`.

        eta scales the standard deviation of eq. 16: 0 adds no noise, 1 adds the posterior's (the learned variance is not used).
        With `x0_range` the predicted clean token is clamped, and the direction to x_t is that of the clamped token.
        """
        now = self.at_step(index)
        x0 = _clean(now, x, predicted_noise)
        if x0_range is not None:
            x0 = torch.clamp(x0, *x0_range)
            predicted_noise = (now.sqrt_recip_alpha_bar * x - x0) / now.sqrt_recip_alpha_bar_minus_one
        if index == 0:
            return x0
        variance = eta**2 * now.posterior_variance
        direction = (now.one_minus_next_alpha_bar - variance).clamp(min=0).sqrt()
        return now.sqrt_next_alpha_bar * x0 + direction * predicted_noise + variance.sqrt() * noise * temperature


def _clean(now: Schedule, xt: Tensor, predicted_noise: Tensor) -> Tensor:
    """The clean token that corresponds to the predicted noise."""
    return now.sqrt_recip_alpha_bar * xt - now.sqrt_recip_alpha_bar_minus_one * predicted_noise


def _posterior_mean(now: Schedule, x0: Tensor, xt: Tensor) -> Tensor:
    return now.x0_coefficient * x0 + now.xt_coefficient * xt


def _log_variance(now: Schedule, interpolation: Tensor) -> Tensor:
    share = (interpolation + 1) / 2
    return share * now.max_log_variance + (1 - share) * now.min_log_variance


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of x under a Gaussian discretised to bins of ±1/255, open-ended beyond ±0.999; all (N, D).

    The distribution function is approximated by ½(1 + tanh(√(2/π)(x + 0.044715x³))); probabilities are at least 1e-12.
    """

    def distribution(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    inverse_scale = torch.exp(-log_scale)
    upper = distribution((x - mean + 1 / 255) * inverse_scale)
    lower = distribution((x - mean - 1 / 255) * inverse_scale)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
