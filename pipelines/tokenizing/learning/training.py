"""One worker's part of an autoencoder's training: the network, its losses and optimizers, and one step of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mar_model.checkpoints.checkpoint import load_weights, optimizer_tensors
from mar_model.noise import stream
from mar_model.tokenizers import KLAutoencoder, VQAutoencoder, make_tokenizer
from mar_model.tokenizers.losses.objective import Losses, Objective
from mar_model.tokenizers.losses.reconstruction import Weights
from mar_model.training.ema import WeightAverage
from pipelines.runtime.cluster.precision import autocast
from pipelines.tokenizing.directory import ENCODER
from pipelines.tokenizing.learning.adversary import Adversary, Generator
from pipelines.tokenizing.learning.codes import CodeWatch
from pipelines.tokenizing.learning.perceptual import perceptual_distance
from pipelines.tokenizing.learning.progress import named, part, put_state
from pipelines.tokenizing.learning.workers import Replicated
from pipelines.tokenizing.settings import TokenizerSettings

GRADIENT_CLIP = 1.0


class Training:
    """The state of a training. `figures` of a step are named by `names`."""

    def __init__(
        self, settings: TokenizerSettings, seed: int, device: torch.device, workers: int, initial: Mapping[str, Tensor] | None = None
    ) -> None:
        """`initial`: weights to start from, else random ones, equal in every worker. Raises ValueError where they do not fit."""
        self.settings, self.seed, self.device, self.workers = settings, seed, device, workers
        self.tokenizer = self._tokenizer(initial).to(device)
        if settings.channels_last:
            self.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = Objective(
            self.tokenizer,
            Weights(settings.l1_weight, settings.l2_weight, settings.perceptual_weight, settings.kl_weight),
            learned_variance=settings.learned_variance,
            quantizer_form=settings.quantizer_loss,
            perceptual=perceptual_distance(settings, device),
        ).to(device)
        self.parameters = [one for one in self.objective.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, settings.learning_rate, (settings.beta1, settings.beta2), weight_decay=settings.weight_decay, fused=True
        )
        self.adversary = Adversary(settings, seed, device, workers) if settings.adversarial_weight else None
        self.average = WeightAverage(self.tokenizer, settings.ema_decay, warmup=True) if settings.ema_decay else None
        self.codes = CodeWatch(self.tokenizer, settings, seed, workers) if isinstance(self.tokenizer, VQAutoencoder) else None
        self.names = (*self.objective.names, *(self.adversary.names if self.adversary else ()))
        self._replicated = Replicated(self.objective, 1)

    def _tokenizer(self, initial: Mapping[str, Tensor] | None) -> KLAutoencoder | VQAutoencoder:
        with torch.random.fork_rng():
            torch.manual_seed(stream(self.seed, "tokenize", "weights").initial_seed())
            tokenizer = make_tokenizer(self.settings.network())
        if initial is not None:
            load_weights(tokenizer, dict(initial))
        for name, parameter in tokenizer.named_parameters():
            parameter.requires_grad_(self.settings.train == "all" or not name.startswith(ENCODER))
        if self.settings.activation_checkpointing:
            for level in (*tokenizer.encoder.down, tokenizer.encoder.mid, tokenizer.decoder.mid, *tokenizer.decoder.up):
                level.forward = partial(checkpoint, level.forward, use_reentrant=False)  # type: ignore[method-assign]
        if self.settings.compile:
            tokenizer.encoder.compile()
            tokenizer.decoder.compile()
        return tokenizer

    def distribute(self) -> None:
        """From now on gradients are means over the workers. Weights have been loaded before."""
        self._replicated = Replicated(self.objective, self.workers)
        if self.adversary:
            self.adversary.distribute()

    def warm_up(self, images: Tensor, noise: Tensor) -> None:
        """Run a backward pass and discard its gradients. DDP rebuilds its buckets after the first one, which changes the order of sums:
        without this, a resumed run would not take the same steps as an uninterrupted one, to the last bit."""
        if self.workers == 1:
            return
        micro_batch = self.settings.micro_batch or len(images)
        losses, _ = self._forward(self._placed(images[:micro_batch]), noise[:micro_batch].to(self.device))
        losses.loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary:
            self.adversary.warm_up(self._placed(images[:micro_batch]))

    def step(self, images: Tensor, noise: Tensor, images_seen: int, learning_rate: float) -> Tensor:
        """One optimizer step on this worker's share of the batch that begins at `images_seen`; returns its figures (n,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        images, noise = self._placed(images), noise.to(self.device)
        micro_batch = self.settings.micro_batch or len(images)
        parts = list(zip(images.split(micro_batch), noise.split(micro_batch), strict=True))
        against = self.adversary if self.adversary and images_seen >= self.settings.adversarial_start else None
        ahead = self._forward(*parts[0], against) if len(parts) == 1 else None
        weight, generator_loss = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        if against:  # the weight is the whole batch's: with micro-batches it takes a forward pass of its own
            passes = [ahead] if ahead else (self._forward(*one, against, alone=True) for one in parts)
            weight = against.weight(passes, self.tokenizer.decoder.last_layer)
        done: list[Losses] = []
        for index, one in enumerate(parts):
            with self._replicated.micro_batch(index + 1 == len(parts)):
                losses, generator = ahead or self._forward(*one, against)
                loss = losses.loss
                if generator is not None:
                    loss = loss + self.settings.adversarial_weight * weight * generator.term(losses.images)
                    generator_loss += generator.loss / len(parts)
                (loss / len(parts)).backward()
            done.append(losses.detached())
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        figures = torch.stack([losses.figures for losses in done]).mean(dim=0)
        if self.adversary:
            figures = torch.cat([figures, figures.new_full((len(self.adversary.names),), torch.nan)])
        if against:
            loss = against.step(images, torch.cat([losses.images for losses in done]), learning_rate, micro_batch)
            figures[-3:] = torch.stack([generator_loss, loss, weight])
        if self.codes:
            self._watch_codes(self.codes, done, images_seen)
        if self.average:
            self.average.update(self.tokenizer, images_seen // self.settings.batch)
        return figures

    def _forward(
        self, images: Tensor, noise: Tensor, against: Adversary | None = None, *, alone: bool = False
    ) -> tuple[Losses, Generator | None]:
        """The losses of a micro-batch, and with an adversary its term. `alone`: no backward pass of the whole follows."""
        computed: Any = self.objective if alone else self._replicated
        with autocast(self.settings.precision, self.device):
            losses: Losses = computed(images, noise)
        return losses, against.generator(losses.images) if against else None

    def _placed(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        return images.to(self.device, memory_format=layout)

    def _watch_codes(self, codes: CodeWatch, done: list[Losses], images_seen: int) -> None:
        codes.count(torch.cat([losses.indices for losses in done if losses.indices is not None]))
        if self.settings.train == "all":
            codes.revive(torch.cat([losses.latents for losses in done if losses.latents is not None]), images_seen, self.optimizer)

    @contextmanager
    def evaluated(self) -> Iterator[KLAutoencoder | VQAutoencoder]:
        """The tokenizer that is written, in evaluation mode: in the body its weights are the moving average, if there is one."""
        raw = {name: value.detach().clone() for name, value in self.tokenizer.named_parameters()} if self.average else {}
        self._put(self.average.weights if self.average else {})
        self.tokenizer.eval()
        yield self.tokenizer
        self._put(raw)
        self.tokenizer.train()

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.tokenizer.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, in host memory."""
        tensors = named("weight.", self.tokenizer.state_dict()) | optimizer_tensors(self.tokenizer, self.optimizer)
        if self.objective.variance is not None:
            state = optimizer_tensors(self.objective.variance, self.optimizer)
            tensors |= named("variance.", self.objective.variance.state_dict()) | named("variance_state.", state)
        if self.average:
            tensors |= named("average.", self.average.weights)
        if self.adversary:
            tensors |= self.adversary.tensors()
        if self.codes:
            tensors |= named("codes.", {"idle": self.codes.idle, "counts": self.codes.counts})
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned. Raises ValueError or LookupError where something is missing or does not fit."""
        load_weights(self.tokenizer, part(tensors, "weight."))
        put_state(self.tokenizer, self.optimizer, tensors)
        if self.objective.variance is not None:
            load_weights(self.objective.variance, part(tensors, "variance."))
            put_state(self.objective.variance, self.optimizer, part(tensors, "variance_state."))
        if self.average:
            self.average.load(part(tensors, "average."))
        if self.adversary:
            self.adversary.load(tensors)
        if self.codes:
            self.codes.idle.copy_(tensors["codes.idle"])
            self.codes.counts.copy_(tensors["codes.counts"])
