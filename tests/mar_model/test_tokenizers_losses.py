"""Loss terms, adaptive weight, discriminator and LPIPS against plain float64 computations in NumPy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mar_model.tokenizers.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, last_layer_gradients
from mar_model.tokenizers.losses.discriminator import PatchDiscriminator
from mar_model.tokenizers.losses.perceptual import LPIPS, WIDTHS, feature_distance, load_lpips
from mar_model.tokenizers.losses.reconstruction import LearnedVariance, pixel_error


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def as_float32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).float()


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, stride: int, padding: int) -> np.ndarray:
    """A convolution by its definition: (B, C, H, W) and (O, C, k, k) → (B, O, h, w)."""
    kernel = weight.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows, columns = ((side - kernel) // stride + 1 for side in x.shape[2:])
    out = np.zeros((len(x), len(weight), rows, columns))
    for row in range(rows):
        for column in range(columns):
            patch = x[:, :, row * stride : row * stride + kernel, column * stride : column * stride + kernel]
            out[:, :, row, column] = np.einsum("bcij,ocij->bo", patch, weight)
    return out if bias is None else out + bias[None, :, None, None]


def test_pixel_error_and_learned_variance() -> None:
    images, others = draws(2, 3, 4, 4), draws(2, 3, 4, 4, seed=1)
    expected = 0.7 * abs(others - images) + 0.3 * (others - images) ** 2
    found = pixel_error(as_float32(others), as_float32(images), 0.7, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    variance = LearnedVariance()
    np.testing.assert_allclose(variance(found).detach(), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        variance.log_variance.fill_(0.4)
    loss = variance(found).sum()
    assert loss.item() == pytest.approx((expected / math.exp(0.4) + 0.4).sum(), rel=1e-6)
    loss.backward()
    assert variance.log_variance.grad.item() == pytest.approx((1 - expected / math.exp(0.4)).sum(), rel=1e-5)


def test_hinge_losses() -> None:
    real, fake = draws(5, 1, 3, 3), draws(5, 1, 3, 3, seed=1)
    expected = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    assert discriminator_loss(as_float32(real), as_float32(fake)).item() == pytest.approx(expected, rel=1e-6)
    assert generator_loss(as_float32(fake)).item() == pytest.approx(-fake.mean(), rel=1e-6)


def test_adaptive_weight() -> None:
    one, other = draws(3, 2, 3, 3), 0.01 * draws(3, 2, 3, 3, seed=1)
    expected = math.sqrt((one**2).sum()) / (math.sqrt((other**2).sum()) + 1e-4)
    assert adaptive_weight(as_float32(one), as_float32(other)).item() == pytest.approx(expected, rel=1e-6)
    assert adaptive_weight(as_float32(1e4 * one), torch.zeros(3)).item() == 1e4  # clamped

    layer, inputs = torch.nn.Parameter(as_float32(draws(4, 3))), as_float32(draws(2, 3, seed=1))
    out = inputs @ layer.T
    weight = adaptive_weight(*last_layer_gradients(out.square().sum(), -out.mean(), layer))
    outputs = draws(2, 3, seed=1) @ draws(4, 3).T
    reconstruction = np.einsum("bo,bi->oi", 2 * outputs, draws(2, 3, seed=1))
    generator = -np.ones((4, 1)) * draws(2, 3, seed=1).sum(0) / 8
    expected = math.sqrt((reconstruction**2).sum()) / (math.sqrt((generator**2).sum()) + 1e-4)
    assert weight.item() == pytest.approx(expected, rel=1e-6)
    assert not weight.requires_grad


def test_discriminator_by_its_definition() -> None:
    network = PatchDiscriminator(filters=4, layers=2).initialize(torch.Generator().manual_seed(0))
    weights = {name: value.double().numpy() for name, value in network.state_dict().items()}
    images = draws(2, 3, 12, 16)
    x = convolved(images, weights["main.0.weight"], weights["main.0.bias"], 2, 1)
    x = np.where(x > 0, x, 0.2 * x)
    for convolution, norm, stride in ((2, 3, 2), (5, 6, 1)):
        x = convolved(x, weights[f"main.{convolution}.weight"], None, stride, 1)
        groups = x.reshape(len(x), network.main[norm].num_groups, -1)
        groups = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
        x = groups.reshape(x.shape) * weights[f"main.{norm}.weight"][:, None, None] + weights[f"main.{norm}.bias"][:, None, None]
        x = np.where(x > 0, x, 0.2 * x)
    expected = convolved(x, weights["main.8.weight"], weights["main.8.bias"], 1, 1)
    found = network.double()(torch.from_numpy(images)).detach().numpy()
    assert found.shape == (2, 1, 1, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="images are 8×8, expected sides of 12 pixels or more"):
        network(torch.zeros(1, 3, 8, 8))


def test_the_published_discriminator() -> None:
    network = PatchDiscriminator().initialize(torch.Generator().manual_seed(0))
    assert [tuple(value.shape) for name, value in network.state_dict().items() if value.ndim == 4] == [
        (64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4),
    ]  # fmt: skip
    assert network.main[2].weight.std().item() == pytest.approx(0.02, rel=0.01)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
        alone, together = network(torch.ones(1, 3, 32, 32)), network(torch.cat([torch.ones(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)]))
    torch.testing.assert_close(alone[0], together[0])  # no image takes part in another's result


def test_lpips_by_its_definition(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    made = LPIPS()
    features = {
        name: torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else torch.zeros(value.shape)
        for name, value in made.state_dict().items()
        if name.startswith("features.")
    }
    linear = {f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for number, width in enumerate(WIDTHS)}
    torch.save({**features, "classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg16.pth")
    save_file(linear, tmp_path / "linear.safetensors")
    network = load_lpips(tmp_path / "vgg16.pth", tmp_path / "linear.safetensors")
    images, others = draws(2, 3, 16, 16), draws(2, 3, 16, 16, seed=1)

    def layers(x: np.ndarray) -> list[np.ndarray]:
        x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        taken = []
        for stage, numbers in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
            if stage:
                x = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).max(axis=(3, 5))
            for number in numbers:
                weight, bias = (features[f"features.{number}.{one}"].double().numpy() for one in ("weight", "bias"))
                x = np.maximum(0, convolved(x, weight, bias, 1, 1))
            taken.append(x / np.sqrt((x**2).sum(axis=1, keepdims=True)).clip(1e-10))
        return taken

    pairs = list(zip(layers(images), layers(others), linear.values(), strict=True))
    expected = sum(np.einsum("bchw,c->bhw", (a - b) ** 2, w.flatten().double().numpy()).mean(axis=(1, 2)) for a, b, w in pairs)
    found = network.double()(torch.from_numpy(images), torch.from_numpy(others))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert network.double()(torch.from_numpy(images), torch.from_numpy(images)).tolist() == [0.0, 0.0]
    alike = sum(((a - b) ** 2).mean(axis=(1, 2, 3)) for a, b, _ in pairs)
    found = feature_distance(*(network.layers(torch.from_numpy(one)) for one in (images, others)))
    np.testing.assert_allclose(found, alike, rtol=1e-6)
    with pytest.raises(ValueError, match=r"linear.safetensors does not hold the weights that LPIPS needs: missing \(26\)"):
        load_lpips(tmp_path / "linear.safetensors", tmp_path / "linear.safetensors")
