"""Memory in training: the closed form against what PyTorch keeps for the backward pass; the mean mask ratio against many draws."""

import pytest
import torch
from torch import Tensor

from mar_model import MAR, MARConfig
from mar_model.masking import draw_mask_ratio, mean_mask_ratio
from mar_model.noise import stream
from mar_model.training.footprint import activation_bytes, parameter_count
from mar_model.training.recipe import micro_batch_draws

CONFIG = MARConfig(  # without dropout attention runs in the same kernels as on a GPU
    encoder_depth=2, encoder_width=192, encoder_heads=4, decoder_depth=3, decoder_width=256, decoder_heads=4, denoiser_depth=2,
    denoiser_width=320, attention_dropout=0.0, projection_dropout=0.0, classes=10,
)  # fmt: skip
IMAGES = 2


def kept_for_backward(model: MAR, masked: int) -> float:
    """Bytes an image that the forward pass keeps, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    draws, _ = micro_batch_draws(CONFIG, IMAGES, masked, seed=0, images_seen=0, micro_batch=0)
    latents = torch.randn(IMAGES, 16, 16, 16, generator=stream(0, "latents"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(latents, torch.zeros(IMAGES, dtype=torch.int64), masked, draws)
    return sum(one.untyped_storage().nbytes() for one in kept.values()) / IMAGES


@pytest.mark.parametrize("masked", [180, 256])
def test_activations_are_what_the_forward_pass_keeps(masked: int) -> None:
    model = MAR(CONFIG).train()
    assert parameter_count(CONFIG) == sum(one.numel() for one in model.parameters())
    assert activation_bytes(CONFIG, masked, value_bytes=4) == pytest.approx(kept_for_backward(model, masked), rel=0.02)
    model.recompute_activations()
    one_block = 4 * masked * (12 + 8 * 4) * CONFIG.denoiser_width  # the largest, there in the backward pass alone
    planned = activation_bytes(CONFIG, masked, value_bytes=4, recompute=True) - one_block
    assert planned == pytest.approx(kept_for_backward(model, masked), rel=0.05)


def test_the_mean_mask_ratio_is_that_of_the_draws() -> None:
    assert mean_mask_ratio() == pytest.approx(0.867, abs=5e-4)
    generator = torch.Generator().manual_seed(0)
    for values in ((1.0, 0.25, 0.7), (0.8, 0.1, 0.5)):
        draws = [draw_mask_ratio(generator, *values) for _ in range(2000)]
        assert mean_mask_ratio(*values) == pytest.approx(sum(draws) / len(draws), abs=0.01)
