"""One worker's part of an autoencoder's training: the network, its losses and optimizers, and one step of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mar_model.checkpoints.checkpoint import load_weights, optimizer_tensors
from mar_model.noise import stream
from mar_model.tokenizers import VQAutoencoder, make_tokenizer
from mar_model.tokenizers.losses.objective import Objective
from mar_model.tokenizers.losses.reconstruction import Weights
from mar_model.tokenizers.quantizer import CodeUse, code_counts, code_use
from mar_model.training.ema import WeightAverage
from pipelines.runtime.cluster.precision import autocast
from pipelines.tokenizing.adversary import Adversary
from pipelines.tokenizing.codes import CodeWatch
from pipelines.tokenizing.perceptual import perceptual_distance
from pipelines.tokenizing.settings import TokenizerSettings

GRADIENT_CLIP = 1.0
BETAS = (0.9, 0.95)


class Training:
    """The state of a training. `figures` of a step are named by `names`."""

    def __init__(self, settings: TokenizerSettings, seed: int, device: torch.device, workers: int) -> None:
        self.settings, self.seed, self.device, self.workers = settings, seed, device, workers
        with torch.random.fork_rng():
            torch.manual_seed(stream(seed, "tokenize", "weights").initial_seed())
            self.tokenizer = make_tokenizer(settings.network()).to(device)
        weights = Weights(
            settings.l1_weight, settings.l2_weight, settings.perceptual_weight, settings.kl_weight, 1.0, settings.adversarial_weight
        )
        self.objective = Objective(
            self.tokenizer,
            weights,
            learned_variance=settings.learned_variance,
            quantizer_form=settings.quantizer_loss,
            perceptual=perceptual_distance(settings, device),
        ).to(device)
        self.parameters = [one for one in self.objective.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, betas=BETAS, fused=True)
        self.adversary = Adversary(settings, seed, device, workers) if settings.adversarial_weight else None
        self.average = WeightAverage(self.tokenizer, settings.ema_decay, warmup=True) if settings.ema_decay else None
        self.codes = CodeWatch(self.tokenizer, settings, seed, workers) if isinstance(self.tokenizer, VQAutoencoder) else None
        self.names = (*self.objective.names, *(self.adversary.names if self.adversary else ()))
        self._computed: nn.Module = self.objective

    def distribute(self) -> None:
        """From now on gradients are means over the workers. Weights have been loaded before."""
        if self.workers > 1:
            self._computed = nn.parallel.DistributedDataParallel(self.objective)
            if self.adversary:
                self.adversary.distribute()

    def step(self, images: Tensor, noise: Tensor, images_seen: int, learning_rate: float) -> Tensor:
        """One optimizer step on this worker's share of the batch that begins at `images_seen`; returns its figures (n,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with autocast(self.settings.precision, self.device):
            losses = self._computed(images, noise)
        loss, adversarial = losses.loss, None
        against = self.adversary if self.adversary and images_seen >= self.settings.adversarial_start else None
        if against:
            adversarial = against.generator_term(losses, self.tokenizer.decoder.last_layer)
            loss = loss + adversarial.term
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        figures = losses.figures
        if against and adversarial:
            figures = torch.cat([figures, against.step(images, losses.images.detach(), learning_rate, adversarial)])
        elif self.adversary:
            figures = torch.cat([figures, figures.new_full((len(self.adversary.names),), torch.nan)])
        if self.codes and losses.indices is not None and losses.latents is not None:
            self.codes.count(losses.indices)
            self.codes.revive(losses.latents, images_seen, self.optimizer)
        if self.average:
            self.average.update(self.tokenizer, images_seen // self.settings.batch)
        return figures

    def code_use(self) -> CodeUse | None:
        """Perplexity and share of the codes since the last call, over all workers; None of a continuous tokenizer."""
        return self.codes.use() if self.codes else None

    def trained(self) -> nn.Module:
        """The tokenizer with the weights that are to be written: their moving average, if there is one."""
        if self.average:
            with torch.no_grad():
                for name, parameter in self.tokenizer.named_parameters():
                    parameter.copy_(self.average.weights[name])
        return self.tokenizer.eval()

    def others(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the tokenizer and its optimizer state."""
        tensors: dict[str, Tensor] = {}
        if self.objective.variance is not None:
            tensors |= {f"variance.{name}": value.detach().cpu() for name, value in self.objective.variance.state_dict().items()}
            state = optimizer_tensors(self.objective.variance, self.optimizer)
            tensors |= {f"variance_state.{name}": value for name, value in state.items()}
        if self.average:
            tensors |= {f"average.{name}": value.cpu() for name, value in self.average.weights.items()}
        if self.adversary:
            tensors |= self.adversary.tensors()
        if self.codes:
            tensors["idle_images"] = self.codes.idle.cpu()
        return tensors

    def load_others(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `others` returned. Raises ValueError or LookupError where something is missing."""
        if self.objective.variance is not None:
            load_weights(self.objective.variance, part(tensors, "variance."))
            put_state(self.objective.variance, self.optimizer, part(tensors, "variance_state."))
        if self.average:
            self.average.load(part(tensors, "average."))
        if self.adversary:
            self.adversary.load(tensors)
        if self.codes:
            self.codes.idle.copy_(tensors["idle_images"])


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def put_state(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put `optimizer_tensors` of `module` back. A parameter that had no state has none again."""
    for name, parameter in module.named_parameters():
        if f"step.{name}" in tensors:
            state = {kind: tensors[f"{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {kind: value.to(parameter.device) for kind, value in state.items()}


__all__ = ["GRADIENT_CLIP", "Training", "code_counts", "code_use", "part", "put_state"]
