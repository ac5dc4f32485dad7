"""A random model of 16 tokens in which everything has a say: classes, context, guidance."""

import torch
from torch import Tensor

from mar_model import MAR, MARConfig
from mar_model.noise import stream

TINY = MARConfig(
    encoder_depth=2, encoder_width=32, encoder_heads=2, decoder_depth=2, decoder_width=48, decoder_heads=3, buffer_size=3,
    denoiser_depth=2, denoiser_width=40, latent_size=8, latent_channels=2, patch_size=2, classes=5,
)  # fmt: skip
TOKENS = 16


def tiny_model() -> MAR:
    made = MAR(TINY)
    for name, parameter in made.named_parameters():  # a fresh denoiser's output is zero
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=stream(0, name))
    return made.eval()


def latents(images: int) -> Tensor:
    return torch.randn(images, 2, 8, 8, generator=stream(1, "known"))
