"""Sizes, initial values, and what does not depend on how the work is cut up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn import generate

from mar_model import MAR, MARConfig, SampleNoise
from mar_model.training.recipe import band_sums, learning_rate, micro_batch_draws, parameter_groups

TINY = MARConfig(
    encoder_depth=2, encoder_width=32, encoder_heads=2, decoder_depth=1, decoder_width=48, decoder_heads=3, buffer_size=3,
    denoiser_depth=2, denoiser_width=40, latent_size=4, latent_channels=2, patch_size=2, classes=5,
)  # fmt: skip


def model(config: MARConfig = TINY) -> MAR:
    torch.manual_seed(0)
    made = MAR(config)
    for parameter in made.parameters():  # a fresh denoiser's output is zero: give every weight a say
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.mark.parametrize(
    ("width", "depth", "denoiser_depth", "denoiser_width", "expected"),
    [(768, 12, 6, 1024, 207_924_768), (1024, 16, 8, 1280, 478_326_304), (1280, 20, 12, 1536, 942_403_104)],
)
def test_published_parameter_counts(width: int, depth: int, denoiser_depth: int, denoiser_width: int, expected: int) -> None:
    heads = 12 if width == 768 else 16
    config = MARConfig(
        encoder_width=width, encoder_depth=depth, encoder_heads=heads, decoder_width=width, decoder_depth=depth, decoder_heads=heads,
        denoiser_depth=denoiser_depth, denoiser_width=denoiser_width,
    )  # fmt: skip
    with torch.device("meta"):
        made = MAR(config)
    assert sum(parameter.numel() for parameter in made.parameters()) == expected


def test_patches_hold_channel_row_column_in_this_order() -> None:
    latents = torch.arange(2 * 4 * 4).float().view(1, 2, 4, 4)
    tokens = MAR(TINY).patchify(latents)
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # second patch: columns 2–3 of rows 0–1, channel 0 then 1
    assert torch.equal(MAR(TINY).unpatchify(tokens), latents)


def test_fresh_model_predicts_zero_noise() -> None:
    made = MAR(TINY)
    draws, _ = micro_batch_draws(TINY, 3, 2, seed=0, images_seen=0, micro_batch=0)
    loss, timesteps = made(torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2]), 2, draws)
    expected = draws.noise.square().mean(dim=-1).flatten()
    torch.testing.assert_close(loss.mse, expected)
    assert timesteps.shape == loss.total.shape == (4 * 3 * 2,)


def test_sample_does_not_depend_on_its_batch() -> None:
    made = model()
    options = {"ar_steps": 3, "diffusion_steps": 8, "guidance": 2.0, "x0_range": (torch.full((2,), -3.0), torch.full((2,), 3.0))}
    together = generate(made, torch.tensor([0, 1, 2, 3]), SampleNoise(7, [0, 1, 2, 3]), **options)
    alone = generate(made, torch.tensor([2]), SampleNoise(7, [2]), **options)
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-4)
    again = generate(made, torch.tensor([0, 1, 2, 3]), SampleNoise(7, [0, 1, 2, 3]), **options)
    assert torch.equal(together, again)
    other = generate(made, torch.tensor([2]), SampleNoise(8, [2]), **options)
    assert float((other - alone).abs().max()) > 0.1


def test_predicted_clean_tokens_stay_in_their_range() -> None:
    low, high = torch.tensor([-0.5, -0.1]), torch.tensor([0.25, 0.1])
    latents = generate(model(), torch.tensor([1, 4]), SampleNoise(0, [0, 1]), ar_steps=2, diffusion_steps=5, x0_range=(low, high))
    for channel in range(2):  # the last denoising step returns the predicted clean token itself
        assert float(latents[:, channel].min()) >= float(low[channel]) - 1e-6
        assert float(latents[:, channel].max()) <= float(high[channel]) + 1e-6
    free = generate(model(), torch.tensor([1, 4]), SampleNoise(0, [0, 1]), ar_steps=2, diffusion_steps=5)
    assert float(free.abs().max()) > 0.25


def test_guidance_one_is_the_conditional_model() -> None:
    made = model()
    plain = generate(made, torch.tensor([3]), SampleNoise(0, [0]), ar_steps=2, diffusion_steps=4)
    constant = generate(made, torch.tensor([3]), SampleNoise(0, [0]), ar_steps=2, diffusion_steps=4, guidance=1 + 1e-6)
    torch.testing.assert_close(plain, constant, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 5])}, "labels range from 0 to 5, expected 0 to 4"),
        ({"ar_steps": 0}, "ar_steps is 0"),
        ({"diffusion_steps": 1001}, "diffusion_steps is 1001"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"guidance_schedule": "cubic"}, "guidance_schedule is 'cubic'"),
    ],
)
def test_impossible_requests_are_refused(change: dict, message: str) -> None:
    request = {"labels": torch.tensor([0, 1]), **change}
    with pytest.raises(ValueError, match=message):
        generate(model(), request.pop("labels"), SampleNoise(0, [0, 1]), **request)


def test_weight_decay_spares_norms_biases_and_the_denoiser() -> None:
    made = MAR(TINY)
    decayed, kept = parameter_groups(made, 0.02)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    decayed_names = {names[id(one)] for one in decayed["params"]}
    assert {"class_emb.weight", "fake_latent", "mask_token", "encoder_pos_embed_learned", "z_proj.weight"} <= decayed_names
    assert not any(name.startswith("diffloss") or name.endswith("bias") or "norm" in name for name in decayed_names)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_learning_rate_schedule() -> None:
    assert learning_rate(0, 1.0, 100) == 0.0
    assert learning_rate(50, 1.0, 100) == 0.5
    assert learning_rate(10**9, 1.0, 100) == 1.0
    assert learning_rate(150, 2.0, 100, "cosine", 200) == pytest.approx(1.0)
    assert learning_rate(300, 2.0, 100, "cosine", 200) == pytest.approx(0.0)


def test_loss_bands_sum_to_the_whole() -> None:
    mse, timesteps = torch.rand(1000), torch.randint(1000, (1000,))
    sums = band_sums(mse, timesteps)
    assert sums[1].sum() == 1000
    assert float(sums[0].sum()) == pytest.approx(float(mse.sum()), rel=1e-5)
    assert sums[1, 3] == (timesteps >= 750).sum()


def test_draws_are_a_function_of_seed_images_seen_and_micro_batch() -> None:
    first, dropout = micro_batch_draws(TINY, 4, 3, seed=1, images_seen=640, micro_batch=2)
    again, dropout_again = micro_batch_draws(TINY, 4, 3, seed=1, images_seen=640, micro_batch=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert dropout == dropout_again
    for change in ({"seed": 2}, {"images_seen": 0}, {"micro_batch": 3}):
        other, _ = micro_batch_draws(TINY, 4, 3, **{"seed": 1, "images_seen": 640, "micro_batch": 2, **change})
        assert not torch.equal(first.noise, other.noise)
    assert torch.equal(first.orders.sort(dim=1).values, torch.arange(4).expand(4, 4))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("latents", lambda one: one[:, :1], r"latents has shape \(3, 1, 4, 4\) and dtype torch.float32, expected \(3, 2, 4, 4\)"),
        ("latents", torch.Tensor.double, "torch.float64, expected"),
        ("latents", lambda one: one.index_fill(0, torch.tensor([0, 2]), torch.nan), r"NaN or infinite in images \[0, 2\] of 3"),
        ("labels", torch.Tensor.float, r"labels has shape \(3,\) and dtype torch.float32"),
        ("labels", lambda one: one[:2], r"labels has shape \(2,\)"),
        ("labels", lambda one: one + 3, "labels range from 3 to 5, expected 0 to 4"),
        ("masked", lambda one: 5, "masked is 5, expected 1 to 4"),
        ("masked", lambda one: 1, r"draws.timesteps has shape \(4, 3, 2\) and dtype torch.int64, expected \(4, 3, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(name: str, change: Callable[[Any], Any], message: str) -> None:
    draws, _ = micro_batch_draws(TINY, 3, 2, seed=0, images_seen=0, micro_batch=0)
    given: dict[str, Any] = {"latents": torch.randn(3, 2, 4, 4), "labels": torch.tensor([0, 1, 2]), "masked": 2}
    with pytest.raises(ValueError, match=message):
        MAR(TINY)(**{**given, name: change(given[name])}, draws=draws)


def test_without_labels_every_image_sees_the_unconditional_vector() -> None:
    made = model()
    draws, _ = micro_batch_draws(TINY, 3, 2, seed=0, images_seen=0, micro_batch=0)
    latents, dropped = torch.randn(3, 2, 4, 4), draws._replace(label_dropped=torch.ones(3, dtype=torch.bool))
    without, _ = made(latents, None, 2, draws)
    assert torch.equal(without.total, made(latents, torch.tensor([4, 0, 1]), 2, dropped)[0].total)
    kept = draws._replace(label_dropped=torch.zeros(3, dtype=torch.bool))
    assert not torch.allclose(without.total, made(latents, torch.tensor([4, 0, 1]), 2, kept)[0].total)
