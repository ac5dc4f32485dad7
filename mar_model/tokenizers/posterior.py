"""The Gaussian posterior of a continuous tokenizer: its moments are mean and log-variance of each latent."""

import torch
from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # moments are kept unclamped; the clamp belongs to their use


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Moments (B, 2·C, h, w) and standard normal noise (B, C, h, w) → latents (B, C, h, w); log-variance clamped to [-30, 20].

    Raises ValueError where the two shapes do not match.
    """
    if moments.ndim != 4 or noise.shape != (moments.shape[0], moments.shape[1] // 2, *moments.shape[2:]):
        raise ValueError(f"moments have shape {tuple(moments.shape)}, noise {tuple(noise.shape)}, expected (B, 2·C, h, w) and (B, C, h, w)")
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)) * noise


def posterior_kl(moments: Tensor) -> Tensor:
    """KL(posterior ‖ standard normal) of each image in nats, summed over its latents: (B, 2·C, h, w) → (B,)."""
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(dim=1)
