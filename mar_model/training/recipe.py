"""The training recipe: optimizer groups, learning rate, the draws of a micro-batch, and the loss by noise level
(arXiv 2406.11838, appendix; the caller sets the values)."""

import math

import torch
from torch import Tensor, nn

from mar_model.config import MARConfig
from mar_model.head.diffusion import TRAINING_STEPS
from mar_model.mar import TrainingDraws
from mar_model.noise import stream

BANDS = 4  # noise-level bands: timesteps 0–249, 250–499, 500–749, 750–999
SCHEDULES = ("constant", "cosine")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW's two groups: no decay on one-dimensional tensors, biases and all of the denoiser; `weight_decay` on the rest."""
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name.endswith(".bias") or name.startswith("diffloss.")
        (kept if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def learning_rate(images_seen: int, peak: float, warmup_images: int, schedule: str = "constant", schedule_images: int = 0) -> float:
    """The learning rate of the step that starts at `images_seen`: linear warm-up, then constant or a cosine to zero at
    `schedule_images`."""
    if images_seen < warmup_images:
        return peak * images_seen / warmup_images
    if schedule == "constant":
        return peak
    share = (images_seen - warmup_images) / max(schedule_images - warmup_images, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def crosses(images_seen: int, batch: int, every: int) -> bool:
    """Whether the step of `batch` images that ended at `images_seen` reached or passed a multiple of `every`."""
    return images_seen // every > (images_seen - batch) // every


def initial_weights(seed: int) -> int:
    """The seed of a model's initial weights, which are the same on every worker."""
    return stream(seed, "weights").initial_seed()


def micro_batch_draws(
    config: MARConfig, images: int, masked: int, *, seed: int, images_seen: int, micro_batch: int
) -> tuple[TrainingDraws, int]:
    """The draws of micro-batch `micro_batch` of the global batch that starts at `images_seen`, and the seed of its dropout.

    A function of its arguments alone, so the draws do not depend on the worker that runs the micro-batch.
    """

    def purpose(name: str) -> torch.Generator:
        return stream(seed, images_seen, micro_batch, name)

    shape = (config.diffusion_repeats, images, masked)
    keys = torch.rand(images, config.tokens, generator=purpose("order"), dtype=torch.float64)
    draws = TrainingDraws(
        orders=keys.argsort(dim=1),
        label_dropped=torch.rand(images, generator=purpose("label drop")) < config.label_drop,
        timesteps=torch.randint(TRAINING_STEPS, shape, generator=purpose("timesteps")),
        noise=torch.randn(*shape, config.token_dim, generator=purpose("noise")),
    )
    return draws, purpose("dropout").initial_seed()


def band_sums(mse: Tensor, timesteps: Tensor) -> Tensor:
    """Sum and count of the noise-prediction error in each noise-level band: (2, BANDS) float32, on the device of `mse`."""
    band = timesteps // (TRAINING_STEPS // BANDS)
    sums = torch.zeros(2, BANDS, device=mse.device)
    sums[0].index_add_(0, band, mse.detach().float())
    sums[1].index_add_(0, band, torch.ones_like(mse, dtype=torch.float32))
    return sums
