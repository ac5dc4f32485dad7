"""The KL autoencoder against the published KL-16 (golden record), and tokenizers on disk."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mar_model.tokenizers import KLAutoencoder, KLConfig, PixelTokenizer, load_tokenizer, posterior_kl, sample_posterior, save_tokenizer

RECORD = Path(__file__).parents[1] / "data" / "kl16_formula.safetensors"
TINY = KLConfig(channels=4, width=12, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)


def formula_fill(name: str, shape: torch.Size, phase: float) -> torch.Tensor:
    """A tensor of the golden record: a function of its published name and shape alone (so names are tested too)."""
    count = math.prod(shape)
    values = np.sin(0.7 * np.arange(count, dtype=np.float64) + zlib.crc32(name.encode()) % 1009 + phase)
    if len(shape) >= 2:
        values *= math.sqrt(2 * shape[0] / count)
    elif name.endswith(".weight"):
        values = 1 + 0.1 * values
    else:
        values *= 0.02
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


@pytest.fixture(scope="module")
def published() -> KLAutoencoder:
    with torch.device("meta"):
        tokenizer = KLAutoencoder(KLConfig())
    with safe_open(RECORD, "pt") as record:
        phase = float(record.metadata()["phase"])
    weights = {name: formula_fill(name, tensor.shape, phase) for name, tensor in tokenizer.state_dict().items()}
    tokenizer.load_state_dict(weights, assign=True)
    return tokenizer.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_published_parameter_count(published: KLAutoencoder) -> None:
    assert sum(parameter.numel() for parameter in published.parameters()) == 66_456_019
    assert len(published.state_dict()) == 312


@torch.no_grad()
def test_golden_record(published: KLAutoencoder) -> None:
    record = load_file(RECORD)
    assert relative_error(published.encode(record["image"]), record["moments"]) < 1e-4
    assert relative_error(published.decode(record["latent"]), record["decoded"]) < 1e-4


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
