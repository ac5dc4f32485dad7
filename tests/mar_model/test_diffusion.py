"""The diffusion's tables against their closed forms, and masking's lengths and distribution."""

import math

import pytest
import torch

from mar_model.diffusion import Diffusion, cosine_betas, discretised_log_likelihood, respaced_timesteps
from mar_model.ema import WeightAverage, decay_at
from mar_model.masking import draw_mask_ratio, mask_schedule, masked_tokens
from mar_model.noise import stream


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
    torch.testing.assert_close(kept.sqrt_alpha_bar, full.sqrt_alpha_bar[kept.timesteps])


def test_perfect_denoiser_recovers_the_token() -> None:
    diffusion = Diffusion(respaced_timesteps(50))
    x0 = torch.linspace(-1.5, 1.5, 12).view(3, 4)
    x = torch.randn(3, 4, generator=stream(0, "start"))
    for index in reversed(range(50)):
        noise = (x - diffusion.sqrt_alpha_bar[index] * x0) / diffusion.sqrt_one_minus_alpha_bar[index]
        x = diffusion.step(x, index, noise, torch.full_like(x, -1.0), torch.randn(3, 4, generator=stream(0, index)))
    torch.testing.assert_close(x, x0, atol=1e-4, rtol=1e-4)


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
