"""The loss of an autoencoder against a plain float64 computation in NumPy."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from mar_model.tokenizers import KLAutoencoder, KLConfig, VQAutoencoder, VQConfig
from mar_model.tokenizers.losses.objective import Losses, Objective
from mar_model.tokenizers.losses.reconstruction import Weights

SIZES = {"channels": 2, "width": 8, "multipliers": (1, 2), "encoder_blocks": 1, "decoder_blocks": 1, "attention": False}


def images_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    return images, torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)


def brightness(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one.mean(dim=(1, 2, 3)) - other.mean(dim=(1, 2, 3))).square()


def figures(objective: Objective, found: Losses) -> dict[str, float]:
    return dict(zip(objective.names, found.figures.tolist(), strict=True))


def test_a_kl_autoencoders_loss() -> None:
    torch.manual_seed(0)
    tokenizer = KLAutoencoder(KLConfig(**SIZES)).double()
    images, noise = images_and_noise()
    objective = Objective(tokenizer, Weights(0.7, 0.3, 2.0, 0.5), learned_variance=True, perceptual=brightness).double()
    with torch.no_grad():
        objective.variance.log_variance.fill_(0.4)  # type: ignore[union-attr]
        found = objective(images.double(), noise)
        mean, log_variance = (one.numpy() for one in tokenizer.encode(images).chunk(2, dim=1))
        made = tokenizer.decode(torch.from_numpy(mean + np.exp(0.5 * log_variance) * noise.numpy()))
    pixels, others = images.numpy(), made.numpy()
    nats = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum() / 3
    distance = (others.mean(axis=(1, 2, 3)) - pixels.mean(axis=(1, 2, 3))) ** 2
    error = 0.7 * abs(others - pixels) + 0.3 * (others - pixels) ** 2 + 2.0 * distance[:, None, None, None]
    reconstruction = (error / math.exp(0.4) + 0.4).mean()
    expected = {
        "loss": reconstruction + 0.5 * nats / (3 * 8 * 8), "squared_error": ((others - pixels) ** 2).mean(), "kl": nats,
        "absolute_error": abs(others - pixels).mean(), "perceptual": distance.mean(), "log_variance": 0.4,
    }  # fmt: skip
    assert figures(objective, found) == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}
    assert found.reconstruction.item() == pytest.approx(reconstruction, rel=1e-6)


@pytest.mark.parametrize("form", ["published", "corrected"])
def test_a_vq_autoencoders_loss_and_its_gradients(form: Literal["published", "corrected"]) -> None:
    torch.manual_seed(0)
    tokenizer = VQAutoencoder(VQConfig(**SIZES, codes=8)).double()
    nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.5)
    images, noise = images_and_noise()
    objective = Objective(tokenizer, Weights(1.0, 0.0, quantizer=0.8), quantizer_form=form)
    latents: list[torch.Tensor] = []
    tokenizer.quant_conv.register_forward_hook(lambda module, inputs, output: (output.retain_grad(), latents.append(output))[0])
    found = objective(images, noise)
    found.loss.backward()

    before, book = latents[0].detach().numpy(), tokenizer.quantize.embedding.weight.detach().numpy()
    distances = ((before.transpose(0, 2, 3, 1)[..., None, :] - book) ** 2).sum(axis=-1)
    indices = distances.argmin(axis=-1)
    codes = book[indices].transpose(0, 3, 1, 2)
    with torch.enable_grad():
        through = torch.from_numpy(codes).requires_grad_()
        error = (tokenizer.decoder(tokenizer.post_quant_conv(through)) - images).abs().mean()
        [straight] = torch.autograd.grad(error, through)
    term = 1.25 * ((codes - before) ** 2).mean()
    assert found.loss.item() == pytest.approx(error.item() + 0.8 * term, rel=1e-6)
    assert figures(objective, found)["quantizer_loss"] == pytest.approx(term, rel=1e-6)
    np.testing.assert_array_equal(found.indices, indices)
    commitment, codebook = (1.0, 0.25) if form == "published" else (0.25, 1.0)
    expected = straight.numpy() + 0.8 * commitment * 2 * (before - codes) / before.size
    np.testing.assert_allclose(latents[0].grad, expected, rtol=0, atol=1e-6 * abs(expected).max())
    rows = np.zeros_like(book)
    np.add.at(rows, indices.flatten(), (0.8 * codebook * 2 * (codes - before) / before.size).transpose(0, 2, 3, 1).reshape(-1, 2))
    np.testing.assert_allclose(tokenizer.quantize.embedding.weight.grad, rows, rtol=0, atol=1e-6 * abs(rows).max())
