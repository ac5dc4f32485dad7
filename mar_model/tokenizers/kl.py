"""KL autoencoders: the latents are diagonal Gaussians (arXiv 2112.10752, section 3.1; the KL-16 of arXiv 2406.11838, section 4.1)."""

from dataclasses import dataclass

from torch import Tensor, nn

from mar_model.tokenizers.layers import IMAGE_CHANNELS, check_batch, check_sides
from mar_model.tokenizers.network import Decoder, Encoder, NetworkConfig


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
