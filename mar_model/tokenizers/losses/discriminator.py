"""The PatchGAN discriminator (arXiv 1611.07004, appendix 6.1.2) that autoencoders of arXiv 2112.10752 are trained against."""

import torch
from torch import Tensor, nn

from mar_model.tokenizers.layers import IMAGE_CHANNELS

WIDEST = 8  # times the base filters


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) → one logit for each patch, (B, 1, h, w), high where the patch looks real.

    4×4 convolutions: `layers` of stride 2, then two of stride 1. The published BatchNorm is replaced by GroupNorm of 32 groups (fewer
    where the width is not a multiple): its result does not depend on which images share a worker's batch, so that one worker and many
    take the same step.
    """

    def __init__(self, filters: int = 64, layers: int = 3) -> None:
        super().__init__()
        if filters < 1 or layers < 1:
            raise ValueError(f"a discriminator of {filters} filters and {layers} layers, expected 1 or more of both")
        modules: list[nn.Module] = [nn.Conv2d(IMAGE_CHANNELS, filters, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = filters
        for level in range(1, layers + 1):
            wider = filters * min(2**level, WIDEST)
            stride = 2 if level < layers else 1
            modules += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False), nn.GroupNorm(_groups(wider), wider), nn.LeakyReLU(0.2),
            ]  # fmt: skip
            width = wider
        self.main = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, padding=1))
        self.smallest_side = 2**layers * 3  # below it a patch of the last two convolutions is empty

    def initialize(self, generator: torch.Generator) -> "PatchDiscriminator":
        """Weights normal(0, 0.02), those of norms normal(1, 0.02), biases 0, as published. Returns itself."""
        with torch.no_grad():
            for module in self.main:
                if isinstance(module, nn.Conv2d):
                    module.weight.normal_(0.0, 0.02, generator=generator)
                    if module.bias is not None:
                        module.bias.zero_()
                elif isinstance(module, nn.GroupNorm):
                    module.weight.normal_(1.0, 0.02, generator=generator)
                    module.bias.zero_()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError for images that are too small for the patches."""
        if min(images.shape[-2:]) < self.smallest_side:
            raise ValueError(f"images are {images.shape[-2]}×{images.shape[-1]}, expected sides of {self.smallest_side} pixels or more")
        return self.main(images)  # type: ignore[no-any-return]


def _groups(width: int) -> int:
    return next(count for count in range(min(32, width), 0, -1) if width % count == 0)
