"""No tokenizer: the model works on pixels in [-1, 1] (arXiv 2406.11838 does so for 64×64 images)."""

from torch import Tensor, nn

from mar_model.tokenizers.layers import check_batch, without_variance


class PixelTokenizer(nn.Module):
    """The identity, with the interface of a tokenizer. It has no weights."""

    channels = 3
    stride = 1
    codebook = 0

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → moments (B, 6, H, W): the pixels, and log-variance -30 (noise of 3e-7).

        Raises ValueError for images of another shape or dtype.
        """
        check_batch("images", images, self.channels)
        return without_variance(images)

    def moments(self, images: Tensor) -> Tensor:
        """As `encode`: what every kind of tokenizer offers."""
        return self.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) → the same. Raises ValueError for another shape or dtype."""
        check_batch("latents", latents, self.channels)
        return latents
