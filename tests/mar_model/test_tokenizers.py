"""Tokenizers of any size, their contract, and on disk (the published KL-16's numbers: test_golden_records.py)."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mar_model.tokenizers import KLAutoencoder, KLConfig, PixelTokenizer, load_tokenizer, posterior_kl, sample_posterior, save_tokenizer

TINY = KLConfig(channels=4, width=12, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        published = KLAutoencoder(KLConfig())
    assert sum(parameter.numel() for parameter in published.parameters()) == 66_456_019
    assert len(published.state_dict()) == 312


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
def test_any_size_keeps_the_contract(attention: bool) -> None:
    tokenizer = KLAutoencoder(
        KLConfig(channels=5, width=10, multipliers=(1, 2, 3, 3), encoder_blocks=1, decoder_blocks=2, attention=attention)
    )
    moments = tokenizer.encode(torch.rand(2, 3, 16, 24) * 2 - 1)
    assert (tokenizer.channels, tokenizer.stride) == (5, 8)
    assert moments.shape == (2, 10, 2, 3)
    assert tokenizer.decode(moments[:, :5]).shape == (2, 3, 16, 24)
    assert any(".attn" in name for name in tokenizer.state_dict()) == attention


def test_side_that_the_stride_does_not_divide() -> None:
    with pytest.raises(ValueError, match="33×32"):
        KLAutoencoder(TINY).encode(torch.zeros(1, 3, 33, 32))


@pytest.mark.parametrize("tokenizer", [KLAutoencoder(TINY), PixelTokenizer()])
def test_batches_that_do_not_fit(tokenizer: KLAutoencoder | PixelTokenizer) -> None:
    for images in (torch.zeros(1, 4, 32, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images have shape .*, expected \(B, 3, height, width\) floats"):
            tokenizer.encode(images)
    with pytest.raises(ValueError, match=r"latents have shape \(1, 5, 2, 2\)"):
        tokenizer.decode(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match=r"moments have shape \(1, 8, 2, 2\), noise \(1, 4, 2, 1\)"):
        sample_posterior(torch.zeros(1, 8, 2, 2), torch.zeros(1, 4, 2, 1))


def test_sizes_that_make_no_network() -> None:
    with pytest.raises(ValueError, match="width is 0"):
        KLConfig(width=0)
    with pytest.raises(ValueError, match=r"multipliers is \[\]"):
        KLConfig(multipliers=())


def test_posterior_clamps_the_log_variance() -> None:
    mean = torch.full((1, 1, 1, 3), 2.0)
    log_variance = torch.tensor([[[[-100.0, 0.0, 100.0]]]])
    latents = sample_posterior(torch.cat([mean, log_variance], dim=1), torch.ones(1, 1, 1, 3))
    assert latents.flatten().tolist() == pytest.approx([2 + math.exp(-15), 3.0, 2 + math.exp(10)])


def test_posterior_kl_against_torch() -> None:
    moments = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    reference = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(dim=1)
    torch.testing.assert_close(posterior_kl(moments), reference)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = KLAutoencoder(TINY).eval()
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert isinstance(again, KLAutoencoder)
    assert again.config == TINY
    assert not again.training
    assert torch.equal(again.encode(images), tokenizer.encode(images))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_tokenizer(KLAutoencoder(TINY), tmp_path)
    weights = load_file(tmp_path / "tokenizer.safetensors")
    weights["stray"] = weights.pop("quant_conv.bias")
    weights["post_quant_conv.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "tokenizer.safetensors")
    with pytest.raises(ValueError, match=r"quant_conv.bias.*stray.*post_quant_conv.bias is \[7\], expected \[4\]"):
        load_tokenizer(tmp_path)


@torch.no_grad()
def test_pixels_are_their_own_latents(tmp_path: Path) -> None:
    save_tokenizer(PixelTokenizer(), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    moments = tokenizer.encode(images)
    assert moments.shape == (2, 6, 4, 4)
    assert bool((moments[:, 3:] == -30).all())
    latents = sample_posterior(moments, torch.ones_like(images))
    torch.testing.assert_close(tokenizer.decode(latents), images, atol=1e-6, rtol=0)
