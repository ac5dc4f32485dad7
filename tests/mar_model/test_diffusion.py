"""The diffusion's tables against their closed forms, and masking's lengths and distribution."""

import math

import pytest
import torch

from mar_model.head.diffusion import Diffusion, Schedule, cosine_betas, discretised_log_likelihood, respaced_timesteps
from mar_model.masking import draw_mask_ratio, mask_schedule, masked_tokens
from mar_model.noise import stream
from mar_model.training.ema import WeightAverage, decay_at


def test_cosine_schedule_closed_form() -> None:
    alpha_bar = torch.cumprod(1 - cosine_betas(), 0)

    def closed(t: int) -> float:
        return math.cos(((t / 1000) + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 499, 990):
        assert float(alpha_bar[t]) == pytest.approx(closed(t + 1) / closed(0), rel=1e-9)
    assert float(cosine_betas()[-1]) == 0.999


def test_respacing() -> None:
    assert respaced_timesteps(1) == [0]
    assert respaced_timesteps(4) == [0, 333, 666, 999]
    assert respaced_timesteps(1000) == list(range(1000))
    kept = Diffusion(respaced_timesteps(10))
    full = Diffusion()
    torch.testing.assert_close(kept.table[0], full.at(kept.timesteps).sqrt_alpha_bar[:, 0])


def test_perfect_denoiser_recovers_the_token() -> None:
    diffusion = Diffusion(respaced_timesteps(50))
    x0 = torch.linspace(-1.5, 1.5, 12).view(3, 4)
    x = torch.randn(3, 4, generator=stream(0, "start"))
    for index in reversed(range(50)):
        noise = (x - diffusion.at_step(index).sqrt_alpha_bar * x0) / diffusion.at_step(index).sqrt_one_minus_alpha_bar
        x = diffusion.step(x, index, noise, torch.full_like(x, -1.0), torch.randn(3, 4, generator=stream(0, index)))
    torch.testing.assert_close(x, x0, atol=1e-4, rtol=1e-4)


def optimal_noise(x: torch.Tensor, now: Schedule, mean: float, deviation: float) -> torch.Tensor:
    """E[ε | x_t] where clean tokens are normal(mean, deviation²)."""
    signal, noise = now.sqrt_alpha_bar, now.sqrt_one_minus_alpha_bar
    return noise * (x - signal * mean) / (signal**2 * deviation**2 + noise**2)


def test_ddim_without_noise_follows_the_flow_of_gaussian_data() -> None:
    """With the optimal denoiser the flow is known: each token keeps its distance from the mean, in standard deviations of its time."""
    diffusion, mean, deviation = Diffusion(), 0.7, 0.3
    start = torch.linspace(-2.5, 2.5, 12).view(3, 4)
    x, noise = start, torch.full((3, 4), 1e6)  # eta 0: it is not added
    for index in reversed(range(1000)):
        x = diffusion.ddim_step(x, index, optimal_noise(x, diffusion.at_step(index), mean, deviation), noise)
    last = diffusion.at_step(999)
    spread = float(last.sqrt_alpha_bar**2 * deviation**2 + last.sqrt_one_minus_alpha_bar**2) ** 0.5
    torch.testing.assert_close(x, mean + deviation * (start - last.sqrt_alpha_bar * mean) / spread, atol=4e-3, rtol=0)


def test_ddim_with_eta_one_adds_the_variance_of_the_posterior() -> None:
    diffusion = Diffusion(respaced_timesteps(20))
    x, predicted, noise = (torch.randn(5, 4, generator=stream(0, name)) for name in ("x", "predicted", "noise"))
    for index in range(1, 19):  # at 19 the clean token is thousands, and the difference below is lost in rounding
        posterior = diffusion.step(x, index, predicted, torch.full_like(x, -1.0), noise, temperature=0.8)  # −1: the lower bound
        torch.testing.assert_close(
            diffusion.ddim_step(x, index, predicted, noise, eta=1.0, temperature=0.8), posterior, atol=2e-5, rtol=1e-4
        )
        half = diffusion.ddim_step(x, index, predicted, 2 * noise, eta=0.5) - diffusion.ddim_step(x, index, predicted, 0 * noise, eta=0.5)
        torch.testing.assert_close(half, diffusion.at_step(index).posterior_variance.sqrt() * noise, atol=2e-5, rtol=1e-4)
    last = diffusion.ddim_step(x, 0, predicted, noise, eta=1.0)
    torch.testing.assert_close(last, diffusion.step(x, 0, predicted, torch.zeros_like(x), noise))


def test_ddim_keeps_the_clean_token_in_its_range_and_points_from_there() -> None:
    diffusion = Diffusion(respaced_timesteps(20))
    x, predicted = torch.randn(5, 4, generator=stream(0, "x")), torch.randn(5, 4, generator=stream(0, "predicted"))
    bounds = torch.full((4,), -0.2), torch.full((4,), 0.1)
    now, before = diffusion.at_step(9), diffusion.at_step(8)
    clean = ((x - now.sqrt_one_minus_alpha_bar * predicted) / now.sqrt_alpha_bar).clamp(-0.2, 0.1)
    direction = (x - now.sqrt_alpha_bar * clean) / now.sqrt_one_minus_alpha_bar
    expected = before.sqrt_alpha_bar * clean + before.sqrt_one_minus_alpha_bar * direction
    torch.testing.assert_close(diffusion.ddim_step(x, 9, predicted, x, x0_range=bounds), expected, atol=1e-5, rtol=1e-4)


def test_variational_bound_is_zero_for_the_true_posterior() -> None:
    diffusion = Diffusion()
    x0, noise, t = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([1, 5, 100, 500, 900, 999])
    xt = diffusion.noised(x0, t, noise)
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # −1: the variance is the posterior's own
    loss = diffusion.loss(output, x0, xt, t, noise)
    assert float(loss.mse.abs().max()) < 1e-10
    assert float(loss.bound[:5].abs().max()) < 1e-4


def test_discretised_likelihood_sums_to_one() -> None:
    centres = torch.arange(-255, 256, 2).view(-1, 1) / 255
    mean, log_scale = torch.full_like(centres, 0.3), torch.full_like(centres, -1.2)
    probability = discretised_log_likelihood(centres, mean, log_scale).exp()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-5)


def test_mask_schedule() -> None:
    assert mask_schedule(256, 64)[:4] == [256, 255, 254, 253]
    assert mask_schedule(256, 64)[-2:] == [6, 0]
    assert mask_schedule(16, 4) == [16, 14, 11, 6, 0]
    assert mask_schedule(4, 8) == [4, 3, 2, 1, 1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="ar_steps is 0"):
        mask_schedule(16, 0)


def test_mask_ratio_distribution() -> None:
    generator = stream(0, "ratio")
    ratios = torch.tensor([draw_mask_ratio(generator) for _ in range(4000)])
    assert 0.7 <= float(ratios.min()) <= float(ratios.max()) <= 1.0
    assert float(ratios.mean()) == pytest.approx(0.867, abs=0.004)  # the published mean
    assert masked_tokens(256, 0.7) == 180
    assert masked_tokens(256, 1.0) == 256


def test_average_follows_its_definition() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, decay=0.9, warmup=False)
    torch.nn.init.constant_(model.weight, 2.0)
    average.update(model, 0)
    average.update(model, 1)
    assert float(average.weights["weight"]) == pytest.approx(0.81 * 1 + 0.19 * 2)
    assert decay_at(0, 0.9999, warmup=True) == pytest.approx(0.1)
    assert decay_at(10**6, 0.9999, warmup=True) == 0.9999


def test_streams_are_named() -> None:
    assert torch.equal(torch.randn(4, generator=stream(1, 2, "a")), torch.randn(4, generator=stream(1, 2, "a")))
    assert not torch.equal(torch.randn(4, generator=stream(1, 2, "a")), torch.randn(4, generator=stream(1, 2, "b")))
