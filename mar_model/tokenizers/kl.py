"""KL autoencoders: the latents are diagonal Gaussians (arXiv 2112.10752, section 3.1; the KL-16 of arXiv 2406.11838, section 4.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mar_model.tokenizers.layers import IMAGE_CHANNELS, check_batch, check_sides
from mar_model.tokenizers.network import Decoder, Encoder, NetworkConfig

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # moments are kept unclamped; the clamp belongs to their use


@dataclass(frozen=True)
class KLConfig(NetworkConfig):
    """Sizes of a KL autoencoder; the defaults are the published KL-16 (66,456,019 parameters)."""


class KLAutoencoder(nn.Module):
    """A continuous tokenizer: `encode` gives the moments of a Gaussian for each latent."""

    codebook = 0

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.stride = config.stride
        self.encoder = Encoder(config, outputs=2 * config.channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → moments (B, 2·channels, H/stride, W/stride): mean, then unclamped log-variance.

        Raises ValueError where the stride does not divide H or W, and for images of another shape or dtype.
        """
        check_batch("images", images, IMAGE_CHANNELS)
        check_sides(images, self.stride)
        return self.quant_conv(self.encoder(images))  # type: ignore[no-any-return]

    def moments(self, images: Tensor) -> Tensor:
        """As `encode`: what every kind of tokenizer offers."""
        return self.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, channels, h, w) in the tokenizer's own scale → images (B, 3, stride·h, stride·w), about [-1, 1].

        Raises ValueError for latents of another shape or dtype.
        """
        check_batch("latents", latents, self.channels)
        return self.decoder(self.post_quant_conv(latents))  # type: ignore[no-any-return]


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
