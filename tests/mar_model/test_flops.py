"""The closed forms of `mar_model.flops` against PyTorch's own counter."""

from typing import Any

import pytest
import torch
from drawn import generate
from torch.utils.flop_counter import FlopCounterMode

from mar_model import MAR, Architecture, GenerationOptions, MARConfig, SampleNoise, TrainingDraws
from mar_model.config import PUBLISHED
from mar_model.flops import generation_flops, tokenizer_flops, training_flops
from mar_model.tokenizers import KLConfig, NetworkConfig, VQConfig, without_weights
from mar_model.training.recipe import micro_batch_draws

UNEVEN = Architecture(
    encoder_depth=2, encoder_width=96, encoder_heads=3, decoder_depth=3, decoder_width=64, decoder_heads=2, mlp_ratio=3.0, buffer_size=9,
    denoiser_depth=2, denoiser_width=80, diffusion_repeats=2, patch_size=2,
)  # fmt: skip
SMALL = Architecture(
    encoder_depth=1, encoder_width=64, encoder_heads=2, decoder_depth=1, decoder_width=64, decoder_heads=2, buffer_size=4,
    denoiser_depth=1, denoiser_width=48,
)  # fmt: skip


def counted_training(config: MARConfig, images: int, masked: int) -> int:
    """On the meta device: shapes alone, so that the published sizes cost nothing."""
    draws, _ = micro_batch_draws(config, images, masked, seed=0, images_seen=0, micro_batch=0)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = MAR(config).train()
        latents = torch.empty(images, config.latent_channels, config.latent_size, config.latent_size)
        labels = torch.zeros(images, dtype=torch.long)
        loss, _ = model(latents, labels, masked, TrainingDraws(*(one.to("meta") for one in draws)))
        loss.total.mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("architecture", "sizes", "images", "masked"),
    [
        (SMALL, {"latent_size": 8, "latent_channels": 4, "classes": 10}, 3, 64),
        (SMALL, {"latent_size": 8, "latent_channels": 4, "classes": 10}, 20, 40),
        (UNEVEN, {"latent_size": 12, "latent_channels": 6, "classes": 7}, 5, 29),
        (PUBLISHED["mar_base"], {}, 4, 222),
        (PUBLISHED["mar_large"], {}, 2, 180),
    ],
)
def test_training_step(architecture: Architecture, sizes: dict[str, int], images: int, masked: int) -> None:
    config = MARConfig(**vars(architecture), **sizes)
    assert training_flops(config, images, masked) == pytest.approx(counted_training(config, images, masked), rel=0.02)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(("architecture", "side", "ar_steps"), [(SMALL, 6, 5), (UNEVEN, 12, 4), (SMALL, 3, 12)])
def test_generation(architecture: Architecture, side: int, ar_steps: int, guidance: float) -> None:
    config = MARConfig(**vars(architecture), latent_size=side, latent_channels=4, classes=3)
    torch.manual_seed(0)
    model = MAR(config).eval()
    with FlopCounterMode(display=False) as counter:
        generate(model, torch.tensor([0, 2]), SampleNoise(0, [0, 1]), ar_steps=ar_steps, diffusion_steps=6, guidance=guidance)
    expected = generation_flops(config, 2, GenerationOptions(ar_steps=ar_steps, diffusion_steps=6, guidance=guidance))
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(
    "fast",
    [
        {"diffusion_steps_end": 2},
        {"guidance_interval": (0.3, 0.7)},
        {"guidance_interval": (0.45, 0.55)},  # between two steps: nothing is guided
        {"reuse_steps": 2},
        {"reuse_steps": 3, "diffusion_steps_end": 1, "guidance_interval": (0.1, 0.9), "filled": 23},
        {"filled": 5},
    ],
    ids=str,
)
def test_fast_modes_and_completion(fast: dict[str, Any], guidance: float) -> None:
    config = MARConfig(**vars(UNEVEN), latent_size=12, latent_channels=4, classes=3)
    torch.manual_seed(0)
    model = MAR(config).eval()
    options: dict[str, Any] = {"ar_steps": 9, "diffusion_steps": 6}
    filled = fast.get("filled")
    options |= {name: value for name, value in fast.items() if name != "filled"}
    given: dict[str, Any] = {}
    if filled:
        given = {"known": torch.zeros(2, 4, 12, 12), "fill": (torch.arange(config.tokens) < filled).repeat(2, 1)}
    with FlopCounterMode(display=False) as counter:
        generate(model, torch.tensor([0, 2]), SampleNoise(0, [0, 1]), **options, **given, guidance=guidance)
    expected = generation_flops(config, 2, GenerationOptions(**options, guidance=guidance), filled)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (KLConfig(), 64),
        (KLConfig(channels=4, width=24, multipliers=(1, 3, 2), encoder_blocks=1, decoder_blocks=1, attention=False), 16),
        (KLConfig(level_attention="both"), 64),
        (KLConfig(channels=4, multipliers=(1, 2, 4, 4), level_attention="none"), 64),
        (VQConfig(level_attention="both"), 64),
    ],
)
def test_tokenizer(config: NetworkConfig, size: int) -> None:
    found = tokenizer_flops(config, size)
    tokenizer = without_weights(config)
    with torch.device("meta"):
        with FlopCounterMode(display=False) as encoding, torch.no_grad():
            encoded = tokenizer.encode(torch.empty(1, 3, size, size))
        with FlopCounterMode(display=False) as decoding, torch.no_grad():
            tokenizer.decode(encoded.latents if config.codebook else encoded[:, : config.channels])
    assert found.encode == pytest.approx(encoding.get_total_flops(), rel=0.02)
    assert found.decode == pytest.approx(decoding.get_total_flops(), rel=0.02)
