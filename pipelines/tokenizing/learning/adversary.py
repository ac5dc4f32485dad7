"""The discriminator that a tokenizer is trained against, its optimizer, and both of its terms."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mar_model.checkpoints.checkpoint import load_weights, optimizer_tensors
from mar_model.noise import stream
from mar_model.tokenizers.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, last_layer_gradients
from mar_model.tokenizers.losses.discriminator import PatchDiscriminator
from mar_model.tokenizers.losses.objective import Losses
from pipelines.runtime.cluster.precision import autocast
from pipelines.tokenizing.learning.progress import named, part, put_state
from pipelines.tokenizing.learning.workers import Replicated, summed
from pipelines.tokenizing.settings import TokenizerSettings

BETAS = (0.5, 0.9)  # as published


class Generator(NamedTuple):
    """The generator loss, and its gradient with respect to the reconstructions, so that the discriminator is passed through once."""

    loss: Tensor
    gradient: Tensor

    def term(self, reconstructions: Tensor) -> Tensor:
        """A term whose gradients are those of the generator loss. Its value is not."""
        return (reconstructions * self.gradient).sum()


class Adversary:
    """A PatchGAN discriminator in training. It learns from the reconstructions of the step, before the tokenizer's own update."""

    names = ("generator_loss", "discriminator_loss", "adaptive_weight")

    def __init__(self, settings: TokenizerSettings, seed: int, device: torch.device, workers: int) -> None:
        self.settings, self.device, self.workers = settings, device, workers
        network = PatchDiscriminator(settings.discriminator_width, settings.discriminator_layers)
        self.network = network.initialize(stream(seed, "tokenize", "discriminator")).to(device)
        if settings.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate, betas=BETAS, fused=True)
        self._replicated = Replicated(self.network, 1)

    def distribute(self) -> None:
        """From now on gradients are means over the workers."""
        self._replicated = Replicated(self.network, self.workers)

    def generator(self, reconstructions: Tensor) -> Generator:
        """The tokenizer's term for reconstructions (B, 3, H, W)."""
        self.network.requires_grad_(False)
        images = reconstructions.detach().requires_grad_()
        with autocast(self.settings.precision, self.device):
            loss = generator_loss(self.network(images).float())
        [gradient] = torch.autograd.grad(loss, images)
        self.network.requires_grad_(True)
        return Generator(loss.detach(), gradient)

    def weight(self, parts: Iterable[tuple[Losses, Generator | None]], last_layer: nn.Parameter) -> Tensor:
        """The adaptive weight of a global batch, from the micro-batches of this worker: () on the device, equal on all workers."""
        sums = torch.zeros(2, *last_layer.shape, device=self.device)
        count = 0
        for losses, generator in parts:
            assert generator is not None
            sums += torch.stack(last_layer_gradients(losses.reconstruction, generator.term(losses.images), last_layer))
            count += 1
        return adaptive_weight(*(summed(sums, self.workers) / (count * self.workers)))

    def step(self, images: Tensor, reconstructions: Tensor, learning_rate: float, micro_batch: int) -> Tensor:
        """One step of the discriminator on images and reconstructions (B, 3, H, W) that have no gradient. Returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        parts = list(zip(images.split(micro_batch), reconstructions.split(micro_batch), strict=True))
        total = torch.zeros((), device=self.device)
        for index, pair in enumerate(parts):
            with self._replicated.micro_batch(index + 1 == len(parts)):
                with autocast(self.settings.precision, self.device):
                    real, fake = self._replicated(torch.cat(pair)).float().chunk(2)
                loss = discriminator_loss(real, fake) / len(parts)
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def warm_up(self, images: Tensor) -> None:
        """See `Training.warm_up`."""
        if self.workers > 1:
            self._replicated(images).sum().backward()
            self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name."""
        state = optimizer_tensors(self.network, self.optimizer)
        return named("discriminator.", self.network.state_dict()) | named("discriminator_state.", state)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned. Raises ValueError where weights are missing or do not fit."""
        load_weights(self.network, part(tensors, "discriminator."))
        put_state(self.network, self.optimizer, part(tensors, "discriminator_state."))
