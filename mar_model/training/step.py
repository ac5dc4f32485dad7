"""A training step: forward and backward of each micro-batch, then an optimizer step over the global batch, with gradient clipping. A step
with a non-finite loss or gradient is skipped.

The device decides whether a step is skipped. The host reads the decision one step later, so that neither waits for the other, and updates
the averages of the weights then, before the next optimizer step.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mar_model.head.diffusion import TokenLoss
from mar_model.mar import TrainingDraws
from mar_model.noise import to_device
from mar_model.training.ema import WeightAverage, update_averages
from mar_model.training.strategies import Strategy


def forward_backward(
    module: nn.Module,
    latents: Tensor,
    labels: Tensor,
    masked: int,
    draws: TrainingDraws,
    dropout_seed: int,
    scale: float,
    autocast: AbstractContextManager[Any],
) -> tuple[TokenLoss, Tensor, Tensor]:
    """Forward and backward of one micro-batch. Its gradients are added to those of the previous micro-batches.

    latents (B, C, H, W), normalised, are on the training device; labels (B,) and draws are copied to it. The gradients are those of the sum
    of all token losses, multiplied by `scale`. Returns the losses (R·B·M,), their timesteps, and whether the sum is finite
    (zero-dimensional bool), all on the device. The host does not wait for the device.
    """
    device = latents.device
    on_device = TrainingDraws(*(to_device(tensor, device) for tensor in draws))
    torch.manual_seed(dropout_seed)
    with autocast:
        loss, timesteps = module(latents, to_device(labels, device), masked, on_device, finite=False)  # `OptimizerStep` checks
    total = loss.total.sum()
    (total * scale).backward()
    return loss, timesteps, torch.isfinite(total.detach())


class Outcome(NamedTuple):
    """The outcome of one step, the same on every worker."""

    stepped: bool
    losses: list[int]  # micro-batches of the global batch whose loss was not finite
    gradient: str  # the first parameter with a non-finite gradient; empty if there was none
    requests: list[bool]  # in the order of the call


class OptimizerStep:
    """One AdamW step per call, for a model with accumulated gradients.

    `requests`: the number of yes-or-no requests that are reduced with the gradients, so that all workers learn of them at the same step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Sequence[WeightAverage],
        strategy: Strategy,
        gradient_clip: float,
        micro_batches: int,
        workers: int,
        requests: int,
    ) -> None:
        self.model, self.optimizer, self.averages, self.strategy = model, optimizer, averages, strategy
        self.gradient_clip, self.workers = gradient_clip, workers
        named = list(model.named_parameters())
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._device = strategy.own(self._parameters[:1])[0].device
        self._sizes = (micro_batches, requests, len(named) if strategy.sharded else 0)
        self._decided: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self.norm = torch.zeros((), device=self._device)  # of the last step's gradients before clipping; 0 if it was skipped
        self.stepped = torch.ones((), device=self._device)  # whether the last step was taken: 1 or 0

    @torch.no_grad()
    def __call__(self, unsound: Tensor, requests: Sequence[bool]) -> None:
        """Take the step. `unsound` (micro-batches of the global batch,): 1 where this worker ran a micro-batch with a non-finite loss."""
        count, asked, shards = self._sizes
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        squares = torch.stack(torch._foreach_norm(self.strategy.own(gradients))).square()
        news = torch.cat([unsound, to_device(torch.tensor([float(one) for one in requests]), self._device), squares[:shards]])
        if self.workers > 1:  # sums micro-batches and requests, and the squares of sharded gradients
            torch.distributed.all_reduce(news)
        if shards:
            squares = news[count + asked :]
        norm = squares.sum().sqrt()
        sound = torch.isfinite(norm) & (news[:count].sum() == 0)
        self.stepped = sound.float()
        self.norm = torch.where(sound, norm, 0.0)
        self.optimizer.found_inf = 1 - self.stepped  # type: ignore[attr-defined]  # as torch.amp.GradScaler does for a fused optimizer
        self.optimizer.grad_scale = torch.where(sound, (norm / self.gradient_clip).clamp(min=1), 1.0)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        culprit = torch.isfinite(squares).logical_not().float()
        first = torch.where(culprit.any(), culprit.argmax().float(), -1.0)
        self._send(torch.cat([self.stepped[None], first[None], news[: count + asked]]))

    def settle(self, step: int) -> Outcome | None:
        """Return the outcome of the last step once, and update the averages for optimizer step `step` (0-based); None without a step."""
        if self._decided is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        stepped, culprit, *news = self._decided.tolist()
        self._decided = None
        if stepped:
            update_averages(self.averages, self.model, step)
        count = self._sizes[0]
        losses = [index for index, one in enumerate(news[:count]) if one]
        return Outcome(bool(stepped), losses, self._names[int(culprit)] if culprit >= 0 else "", [bool(one) for one in news[count:]])

    def _send(self, decided: Tensor) -> None:
        if self._device.type != "cuda":
            self._decided = decided
            return
        self._decided = torch.empty_like(decided, device="cpu", pin_memory=True).copy_(decided, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()
