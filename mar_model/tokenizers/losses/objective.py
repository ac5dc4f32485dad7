"""The loss of an autoencoder on a batch (arXiv 2112.10752, appendix G), without its adversarial term."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mar_model.tokenizers.kl import KLAutoencoder
from mar_model.tokenizers.losses.reconstruction import LearnedVariance, Weights, pixel_error
from mar_model.tokenizers.posterior import posterior_kl, sample_posterior
from mar_model.tokenizers.quantizer import quantizer_loss, straight_through
from mar_model.tokenizers.vq import VQAutoencoder

Perceptual = Callable[[Tensor, Tensor], Tensor]  # reconstructions, images → (B,)


class Losses(NamedTuple):
    """`loss` to be minimized; `figures` (n,), named by `Objective.names`; `reconstruction`: the part of the loss that the adversarial
    term is balanced with; `latents` before quantization and `indices` are those of a quantized tokenizer."""

    loss: Tensor
    figures: Tensor
    reconstruction: Tensor
    images: Tensor  # reconstructed, (B, 3, H, W)
    latents: Tensor | None = None
    indices: Tensor | None = None

    def detached(self) -> "Losses":
        """The same values without their graph."""
        return Losses(self.loss.detach(), self.figures, self.reconstruction.detach(), self.images.detach(), self.latents, self.indices)


class Objective(nn.Module):
    """Reconstruction per pixel value, plus of a KL autoencoder `weights.kl` times KL(posterior ‖ normal) per image over the number of pixel
    values, or of a VQ autoencoder `weights.quantizer` times the quantizer's loss.

    Both terms of a KL autoencoder are thus sums over an image, divided by the same number.
    """

    def __init__(
        self,
        tokenizer: KLAutoencoder | VQAutoencoder,
        weights: Weights,
        *,
        learned_variance: bool = False,
        quantizer_form: Literal["published", "corrected"] = "published",
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.weights, self.quantizer_form = tokenizer, weights, quantizer_form
        self.variance = LearnedVariance() if learned_variance else None
        self.perceptual = perceptual
        self.names: tuple[str, ...] = ("loss", "squared_error", "quantizer_loss" if tokenizer.codebook else "kl")
        if weights.l1:
            self.names += ("absolute_error",)
        if perceptual is not None:
            self.names += ("perceptual",)
        if learned_variance:
            self.names += ("log_variance",)

    def forward(self, images: Tensor, noise: Tensor) -> Losses:
        """Images (B, 3, H, W) in [-1, 1], and the posterior's noise (B, C, h, w), which a quantized tokenizer does not use."""
        if isinstance(self.tokenizer, VQAutoencoder):
            latents = self.tokenizer.latents(images).float()
            codes, indices = self.tokenizer.quantize(latents)
            reconstructions = self.tokenizer.decode_codes(straight_through(latents, codes)).float()
            term = quantizer_loss(latents, codes, self.quantizer_form)
            reconstruction, others = self._reconstruction(reconstructions, images)
            loss = reconstruction + self.weights.quantizer * term
            figures = self._figures(loss, reconstructions, images, term, others)
            return Losses(loss, figures, reconstruction, reconstructions, latents.detach(), indices)
        moments = self.tokenizer.encode(images).float()
        reconstructions = self.tokenizer.decode(sample_posterior(moments, noise)).float()
        term = posterior_kl(moments).mean()
        reconstruction, others = self._reconstruction(reconstructions, images)
        loss = reconstruction + self.weights.kl * term / images[0].numel()
        return Losses(loss, self._figures(loss, reconstructions, images, term, others), reconstruction, reconstructions)

    def _reconstruction(self, reconstructions: Tensor, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The mean over all pixel values, and the further figures."""
        figures = []
        if self.weights.l1:
            figures.append((reconstructions - images).detach().abs().mean())
        error = pixel_error(reconstructions, images, self.weights.l1, self.weights.l2)
        if self.perceptual is not None:
            distance = self.perceptual(reconstructions, images)
            error = error + self.weights.perceptual * distance.view(-1, 1, 1, 1)
            figures.append(distance.detach().mean())
        if self.variance is not None:
            error = self.variance(error)
            figures.append(self.variance.log_variance.detach())
        return error.mean(), figures

    def _figures(self, loss: Tensor, reconstructions: Tensor, images: Tensor, term: Tensor, others: list[Tensor]) -> Tensor:
        error = (reconstructions - images).detach().square().mean()
        return torch.stack([loss.detach(), error, term.detach(), *others])
