"""The discriminator that a tokenizer is trained against, its optimizer, and both of its terms."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mar_model.checkpoints.checkpoint import load_weights, optimizer_tensors
from mar_model.noise import stream
from mar_model.tokenizers.losses.adversarial import AverageGradients, balanced, discriminator_loss, generator_loss
from mar_model.tokenizers.losses.discriminator import PatchDiscriminator
from mar_model.tokenizers.losses.objective import Losses
from pipelines.runtime.cluster.precision import autocast
from pipelines.tokenizing.settings import TokenizerSettings

BETAS = (0.5, 0.9)  # as published


class GeneratorTerm(NamedTuple):
    """`term` is to be added to the loss: generator loss · adaptive weight · adversarial_weight."""

    term: Tensor
    loss: Tensor
    weight: Tensor


class Adversary:
    """A PatchGAN discriminator in training."""

    names = ("generator_loss", "discriminator_loss", "adaptive_weight")

    def __init__(self, settings: TokenizerSettings, seed: int, device: torch.device, workers: int) -> None:
        self.settings, self.device, self.workers = settings, device, workers
        network = PatchDiscriminator(settings.discriminator_width, settings.discriminator_layers)
        self.network = network.initialize(stream(seed, "tokenize", "discriminator")).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate, betas=BETAS, fused=True)
        self._computed: nn.Module = self.network

    def distribute(self) -> None:
        """From now on gradients are means over the workers."""
        self._computed = nn.parallel.DistributedDataParallel(self.network)

    def generator_term(self, losses: Losses, last_layer: nn.Parameter) -> GeneratorTerm:
        """The tokenizer's term, balanced with its reconstruction loss at the decoder's `last_layer`."""
        self.network.requires_grad_(False)
        with autocast(self.settings.precision, self.device):
            loss = generator_loss(self.network(losses.images).float())
        average = AverageGradients(self.workers) if self.workers > 1 else None
        weight = balanced(losses.reconstruction, loss, last_layer, average)
        self.network.requires_grad_(True)
        return GeneratorTerm(self.settings.adversarial_weight * weight * loss, loss.detach(), weight)

    def step(self, images: Tensor, reconstructions: Tensor, learning_rate: float, against: GeneratorTerm) -> Tensor:
        """One step of the discriminator on images and reconstructions (B, 3, H, W) that have no gradient. Returns the figures `names`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with autocast(self.settings.precision, self.device):
            real, fake = self._computed(torch.cat([images, reconstructions])).float().chunk(2)
        loss = discriminator_loss(real, fake)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([against.loss, loss.detach(), against.weight])

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name."""
        weights = {f"discriminator.{name}": value.detach().cpu() for name, value in self.network.state_dict().items()}
        state = optimizer_tensors(self.network, self.optimizer)
        return weights | {f"discriminator_state.{name}": value for name, value in state.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned."""
        from pipelines.tokenizing.progress import part, put_state

        load_weights(self.network, part(tensors, "discriminator."))
        put_state(self.network, self.optimizer, part(tensors, "discriminator_state."))
