"""VQ autoencoders: each latent is one of the codes of a codebook (arXiv 2012.09841; LDM's VQ-16 of arXiv 2112.10752)."""

from dataclasses import dataclass

from torch import Tensor, nn

from mar_model.tokenizers.layers import IMAGE_CHANNELS, check_batch, check_sides, without_variance
from mar_model.tokenizers.network import Decoder, Encoder, NetworkConfig
from mar_model.tokenizers.quantizer import Codebook, Quantized


@dataclass(frozen=True)
class VQConfig(NetworkConfig):
    """Sizes of a VQ autoencoder. `VQConfig(level_attention="both")` is LDM's VQ-16 (69,593,371 parameters)."""

    channels: int = 8  # of a latent and of a code
    codes: int = 16_384

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.codes, int) or self.codes < 2:
            raise ValueError(f"codes is {self.codes}, expected a whole number, 2 or more")

    @property
    def codebook(self) -> int:
        """Number of codes."""
        return self.codes


class VQAutoencoder(nn.Module):
    """A quantized tokenizer: `encode` gives the latents before quantization and the numbers of their nearest codes."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.stride = config.stride
        self.codebook = config.codes
        self.encoder = Encoder(config, outputs=config.channels)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codes, config.channels)  # quantize(latents) → nearest codes, and their numbers
        self.quant_conv = nn.Conv2d(config.channels, config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)

    def encode(self, images: Tensor) -> Quantized:
        """Images (B, 3, H, W) in [-1, 1] → latents before quantization (B, channels, H/stride, W/stride), and their codes' numbers.

        Raises ValueError where the stride does not divide H or W, and for images of another shape or dtype.
        """
        latents = self.latents(images)
        return Quantized(latents, self.quantize.nearest(latents))

    def latents(self, images: Tensor) -> Tensor:
        """As `encode`, the latents alone."""
        check_batch("images", images, IMAGE_CHANNELS)
        check_sides(images, self.stride)
        return self.quant_conv(self.encoder(images))  # type: ignore[no-any-return]

    def moments(self, images: Tensor) -> Tensor:
        """The latents before quantization as moments with the smallest log-variance, -30: what every kind of tokenizer offers."""
        return without_variance(self.latents(images))

    def codes(self, indices: Tensor) -> Tensor:
        """Numbers of codes (B, h, w) → latents (B, channels, h, w). Raises ValueError for numbers that no code has."""
        return self.quantize.codes(indices)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, channels, h, w), quantized or not → images (B, 3, stride·h, stride·w), about [-1, 1].

        The quantizer belongs to the decoder: latents are quantized first, which leaves codes as they are. Raises ValueError for latents
        of another shape or dtype.
        """
        return self.decode_codes(self.quantize(latents).latents)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """As `decode`, of latents that are codes already, or that stand for them as `straight_through` makes them."""
        return self.decoder(self.post_quant_conv(codes))  # type: ignore[no-any-return]
