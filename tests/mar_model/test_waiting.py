"""The host never waits for the device inside a training step or an AR step.

Both run on the `meta` device, whose tensors have no values: whatever reads one (`item`, `nonzero`, a copy to the CPU, a Boolean mask as an
index) raises an error there, as it would make the host wait on a GPU.
"""

import pytest
import torch
from drawn import generate

from mar_model import MAR, MARConfig, SampleNoise, TrainingDraws
from mar_model.training.ema import WeightAverage
from mar_model.training.recipe import band_sums, micro_batch_draws, parameter_groups

TINY = MARConfig(
    encoder_depth=2, encoder_width=32, encoder_heads=2, decoder_depth=2, decoder_width=48, decoder_heads=3, buffer_size=3,
    denoiser_depth=2, denoiser_width=40, latent_size=8, latent_channels=2, patch_size=2, classes=5,
)  # fmt: skip


@pytest.mark.parametrize("read", [float, lambda x: x.cpu(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.equal(x, x)])
def test_reading_a_value_is_noticed(read) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device="meta"))


@pytest.mark.parametrize("recompute", [False, True])
def test_training_step(recompute: bool) -> None:
    with torch.device("meta"):
        model = MAR(TINY).train()
        latents, labels = torch.empty(3, 2, 8, 8), torch.zeros(3, dtype=torch.long)
    if recompute:
        model.recompute_activations()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-4, foreach=True)  # fused has no kernel there
    average = WeightAverage(model, 0.999, warmup=True)
    for step in range(2):
        draws, seed = micro_batch_draws(TINY, 3, 11, seed=0, images_seen=3 * step, micro_batch=0)
        torch.manual_seed(seed)
        loss, timesteps = model(latents, labels, 11, TrainingDraws(*(one.to("meta") for one in draws)))
        loss.total.mean().backward()
        assert band_sums(loss.mse, timesteps).device.type == "meta"
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model, step)
        assert norm.device.type == "meta"


@pytest.mark.parametrize(
    "options", [{}, {"reuse_steps": 2}, {"sampler": "ddim", "diffusion_steps_end": 2, "guidance_interval": (0.2, 0.7)}]
)
def test_generation(options: dict) -> None:
    with torch.device("meta"):
        model = MAR(TINY).eval()
    noise = SampleNoise(0, [0, 1, 2], "meta")
    latents = generate(model, torch.tensor([0, 1, 4]), noise, ar_steps=5, diffusion_steps=4, guidance=2.0, **options)
    assert latents.device.type == "meta"
    assert latents.shape == (3, 2, 8, 8)
