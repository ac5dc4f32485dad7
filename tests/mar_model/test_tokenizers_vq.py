"""Quantized tokenizers: nearest codes, gradients, losses, use of the codebook, and on disk."""

import json
import math
from pathlib import Path

import pytest
import torch

from mar_model.tokenizers import VQAutoencoder, VQConfig, load_tokenizer, save_tokenizer
from mar_model.tokenizers.quantizer import code_counts, code_use, quantizer_loss, revive, straight_through

TINY = VQConfig(channels=4, width=12, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, level_attention="both", codes=50)


def tokenizer() -> VQAutoencoder:
    torch.manual_seed(0)
    made = VQAutoencoder(TINY).eval()
    torch.nn.init.normal_(made.quantize.embedding.weight)
    return made


@torch.no_grad()
def test_the_contract() -> None:
    made, images = tokenizer(), torch.rand(2, 3, 8, 12) * 2 - 1
    latents, indices = made.encode(images)
    assert (made.channels, made.stride, made.codebook) == (4, 2, 50)
    assert (latents.shape, indices.shape) == ((2, 4, 4, 6), (2, 4, 6))
    distances = torch.cdist(latents.double().permute(0, 2, 3, 1).reshape(-1, 4), made.quantize.embedding.weight.double())
    assert torch.equal(distances.argmin(dim=1), indices.flatten())
    quantized = made.quantize(latents)
    assert torch.equal(quantized.indices, indices)
    assert torch.equal(quantized.latents, made.codes(indices))
    assert torch.equal(quantized.latents[1, :, 2, 3], made.quantize.embedding.weight[indices[1, 2, 3]])
    assert torch.equal(made.quantize(quantized.latents).indices, indices)
    assert torch.equal(made.decode(latents), made.decode_codes(quantized.latents))
    assert torch.equal(made.moments(images)[:, :4], latents)
    assert bool((made.moments(images)[:, 4:] == -30).all())
    assert made.decode(latents).shape == images.shape


def test_distances_in_parts_and_in_bf16_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made, latents = tokenizer(), torch.randn(3, 4, 5, 5)
    whole = made.quantize.nearest(latents)
    monkeypatch.setattr("mar_model.tokenizers.quantizer.DISTANCES_AT_ONCE", 300)
    assert torch.equal(made.quantize.nearest(latents), whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.quantize.nearest(latents), whole)


def test_what_is_no_code_is_named() -> None:
    made = tokenizer()
    with pytest.raises(ValueError, match=r"indices are between -1 and 50, expected 0 to 49"):
        made.codes(torch.tensor([[[-1, 50]]]))
    with pytest.raises(ValueError, match=r"indices have shape \(2, 2\)"):
        made.codes(torch.zeros(2, 2, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"latents have shape \(1, 5, 2, 2\)"):
        made.decode(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match="codes is 1, expected a whole number, 2 or more"):
        VQConfig(codes=1)


@pytest.mark.parametrize(("form", "codebook", "commitment"), [("published", 0.25, 1.0), ("corrected", 1.0, 0.25)])
def test_loss_and_its_gradients(form: str, codebook: float, commitment: float) -> None:
    torch.manual_seed(1)
    latents, codes = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = quantizer_loss(latents, codes, form)  # type: ignore[arg-type]
    loss.backward()
    difference = (codes - latents).detach()
    assert loss.item() == pytest.approx(1.25 * difference.square().mean().item(), rel=1e-12)
    torch.testing.assert_close(codes.grad, codebook * 2 * difference / difference.numel())
    torch.testing.assert_close(latents.grad, -commitment * 2 * difference / difference.numel())


def test_gradients_pass_straight_through() -> None:
    latents = torch.randn(1, 4, 3, 3, requires_grad=True)
    codes = torch.randn(1, 4, 3, 3, requires_grad=True)
    (straight_through(latents, codes) * torch.arange(36.0).view(1, 4, 3, 3)).sum().backward()
    assert torch.equal(latents.grad, torch.arange(36.0).view(1, 4, 3, 3))
    assert codes.grad is None
    torch.testing.assert_close(straight_through(latents, codes), codes)


def test_use_of_codes() -> None:
    counts = code_counts(torch.tensor([[3, 3], [1, 0]]), 5)
    assert counts.tolist() == [1, 1, 0, 2, 0]
    use = code_use(counts)
    assert use.perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert use.used == pytest.approx(0.6)
    assert code_use(torch.full((7,), 3)).perplexity == pytest.approx(7)
    assert all(math.isnan(one) for one in code_use(torch.zeros(5)))


def test_dead_codes_become_encoder_outputs() -> None:
    book, candidates = torch.zeros(6, 2), torch.arange(1.0, 7.0).view(3, 2)
    dead = torch.tensor([True, False, True, True, True, False])
    assert revive(book, dead, candidates, torch.Generator().manual_seed(0)).tolist() == [0, 2, 3, 4]
    assert bool((book[~dead] == 0).all())
    rows = [tuple(row) for row in book[dead].tolist()]
    assert set(rows) == {(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)}  # each once before any twice
    again = torch.zeros(6, 2)
    revive(again, dead, candidates, torch.Generator().manual_seed(0))
    assert torch.equal(again, book)
    assert len(revive(book, torch.zeros(6, dtype=torch.bool), candidates, torch.Generator())) == 0


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    made, images = tokenizer(), torch.rand(2, 3, 8, 8) * 2 - 1
    save_tokenizer(made, tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, VQAutoencoder)
    assert again.config == TINY
    assert torch.equal(again.encode(images).indices, made.encode(images).indices)
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == "vq"
    (tmp_path / "config.json").write_text(json.dumps({"kind": "kl", "codes": 50, "format_version": 1}))
    with pytest.raises(ValueError, match=r"has unknown keys \['codes'\]"):
        load_tokenizer(tmp_path)
