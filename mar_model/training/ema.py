"""The exponential moving average of the weights, with a warm-up of its decay so that in short runs the initial weights do not dominate."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay at optimizer step `step` (0-based): min(decay, (1 + step)/(10 + step)) while warming up."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class WeightAverage:
    """average ← decay · average + (1 − decay) · weights, over all parameters in one fused call."""

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.weights: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.named_parameters()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Restore saved averages. Raises KeyError for a parameter that is missing in `weights`."""
        for name, value in self.weights.items():
            value.copy_(weights[name])

    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the model's weights after optimizer step `step` (0-based)."""
        update_averages([self], model, step)


@torch.no_grad()
def update_averages(averages: Sequence[WeightAverage], model: nn.Module, step: int) -> None:
    """Update several averages of one model, each with its own decay, in one fused call."""
    current: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(
        [value for average in averages for value in average.weights.values()],
        [value for _ in averages for value in current],
        [1 - decay_at(step, average.decay, average.warmup) for average in averages for _ in current],
    )
