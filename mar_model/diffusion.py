"""Gaussian diffusion of one token: the schedule, the training loss and one ancestral step.

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
    """The `steps` of the 1000 training timesteps that sampling visits, ascending: round(i · 999/(steps − 1)), halves to even.

    Raises ValueError outside 1…1000.
    """
    if not 1 <= steps <= TRAINING_STEPS:
        raise ValueError(f"diffusion_steps is {steps}, expected 1 to {TRAINING_STEPS}")
    if steps == 1:
        return [0]
    return [round(i * (TRAINING_STEPS - 1) / (steps - 1)) for i in range(steps)]


class Diffusion(nn.Module):
    """The schedule over the given training timesteps (all by default), as float32 tables of shape (steps,)."""

    timesteps: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    sqrt_recip_alpha_bar: Tensor
    sqrt_recip_alpha_bar_minus_one: Tensor
    x0_coefficient: Tensor
    xt_coefficient: Tensor
    min_log_variance: Tensor
    max_log_variance: Tensor

    def __init__(self, timesteps: list[int] | None = None) -> None:
        super().__init__()
        chosen = torch.tensor(timesteps if timesteps is not None else list(range(TRAINING_STEPS)))
        alpha_bar = torch.cumprod(1 - cosine_betas(), dim=0)[chosen]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        betas = 1 - alpha_bar / previous
        posterior_variance = betas * (1 - previous) / (1 - alpha_bar)
        if len(chosen) > 1:  # at t = 0 the posterior has no variance: its logarithm is replaced by that of t = 1
            posterior_variance[0] = posterior_variance[1]
        tables = {
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "sqrt_recip_alpha_bar": alpha_bar.rsqrt(),
            "sqrt_recip_alpha_bar_minus_one": (1 / alpha_bar - 1).sqrt(),
            "x0_coefficient": betas * previous.sqrt() / (1 - alpha_bar),
            "xt_coefficient": (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar),
            "min_log_variance": posterior_variance.clamp(min=1e-20).log(),
            "max_log_variance": betas.log(),
        }
        self.register_buffer("timesteps", chosen, persistent=False)
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0): (N, D) at schedule indices t (N,)."""
        return self.sqrt_alpha_bar[t, None] * x0 + self.sqrt_one_minus_alpha_bar[t, None] * noise

    def loss(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> TokenLoss:
        """Loss of the denoiser's output (N, 2D) for clean tokens x0 noised to xt at t (N,) with `noise` (N, D)."""
        predicted_noise, interpolation = output.float().chunk(2, dim=1)
        mse = (predicted_noise - noise).square().mean(dim=1)

        log_variance = self._log_variance(interpolation, t)
        mean = self._posterior_mean(self._x0(predicted_noise.detach(), xt, t), xt, t)
        true_mean, true_log_variance = self._posterior_mean(x0, xt, t), self.min_log_variance[t, None]
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

        `x0_range` (two (D,) tensors) keeps the predicted clean token inside; without it the step is the published one.
        """
        x0 = self.sqrt_recip_alpha_bar[index] * x - self.sqrt_recip_alpha_bar_minus_one[index] * predicted_noise
        if x0_range is not None:
            x0 = torch.clamp(x0, *x0_range)
        mean = self.x0_coefficient[index] * x0 + self.xt_coefficient[index] * x
        if index == 0:
            return mean
        share = (interpolation + 1) / 2
        log_variance = share * self.max_log_variance[index] + (1 - share) * self.min_log_variance[index]
        return mean + torch.exp(0.5 * log_variance) * noise * temperature

    def _log_variance(self, interpolation: Tensor, t: Tensor) -> Tensor:
        share = (interpolation + 1) / 2
        return share * self.max_log_variance[t, None] + (1 - share) * self.min_log_variance[t, None]

    def _x0(self, predicted_noise: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return self.sqrt_recip_alpha_bar[t, None] * xt - self.sqrt_recip_alpha_bar_minus_one[t, None] * predicted_noise

    def _posterior_mean(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return self.x0_coefficient[t, None] * x0 + self.xt_coefficient[t, None] * xt


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
