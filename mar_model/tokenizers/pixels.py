"""No tokenizer: the model works on pixels in [-1, 1] (arXiv 2406.11838 does so for 64×64 images)."""

import torch
from torch import Tensor, nn

from mar_model.tokenizers.kl import check_batch


class PixelTokenizer(nn.Module):
    """The identity, in the shape of a tokenizer. It has no weights."""

    channels = 3
    stride = 1

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → moments (B, 6, H, W): the pixels themselves, log-variance -30 (no noise to speak of).

        Raises ValueError for images of another shape or dtype.
        """
        check_batch("images", images, self.channels)
        return torch.cat([images, torch.full_like(images, -30.0)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) → the same. Raises ValueError for another shape or dtype."""
        check_batch("latents", latents, self.channels)
        return latents
