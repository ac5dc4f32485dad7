"""What a line of metrics says: sums over the steps since the line before."""

import math
import time

import torch
from torch import Tensor

from mar_model.head.diffusion import TokenLoss
from mar_model.training.recipe import BANDS, band_sums

SUMS = 2 + 2 * BANDS + 3  # numbers that `Interval.sums` returns


class Interval:
    """Sums over the steps between two lines of metrics; nothing is read from the device until the line is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros(2, device=self.device, dtype=torch.float64)
        self._bands = torch.zeros(2, BANDS, device=self.device, dtype=torch.float64)
        self._norm = torch.zeros(3, device=self.device, dtype=torch.float64)  # sum of the norms, steps taken, steps in all
        self._images, self._rate = 0, 0.0
        self._began = time.perf_counter()

    def add(self, loss: TokenLoss, timesteps: Tensor, finite: Tensor) -> None:
        """One micro-batch; one whose loss is not finite is left out."""
        tokens = loss.total.new_full((), loss.total.numel())  # filled there: a copy from the host would wait
        one = torch.stack([loss.total.detach().sum(), tokens])
        self._loss += torch.where(finite, one, 0.0)
        self._bands += torch.where(finite, band_sums(loss.mse, timesteps), 0.0)

    def steps(self, images: int, gradient_norm: Tensor, stepped: Tensor, rate: float) -> None:
        """One optimizer step over `images` images of the global batch; the norm of one that was skipped is 0."""
        self._images += images
        self._norm += torch.stack([gradient_norm, stepped, torch.ones_like(stepped)])
        self._rate = rate

    def sums(self, workers: int) -> list[float]:
        """The interval so far, summed over all workers (every worker must call it), for a checkpoint that comes in its midst."""
        totals = torch.cat([self._loss, self._bands.flatten()])
        if workers > 1:
            torch.distributed.all_reduce(totals)
        return [*totals.tolist(), *self._norm.tolist()]

    def go_on(self, sums: list[float], worker: int) -> None:
        """Resume an interval in which a checkpoint was written; images a second count from here."""
        if len(sums) < SUMS:  # of an earlier version, which did not count the steps that were skipped
            sums = [*sums, sums[-1]]
        if worker == 0:
            self._loss += torch.tensor(sums[:2], device=self.device, dtype=torch.float64)
            self._bands += torch.tensor(sums[2:-3], device=self.device, dtype=torch.float64).view(2, BANDS)
        self._norm += torch.tensor(sums[-3:], device=self.device, dtype=torch.float64)

    def close(self, workers: int) -> dict[str, float]:
        """The interval's line, summed over all workers (every worker must call it), and a new interval.

        A mean over nothing is NaN: the loss and the norm where no step was finite, a band of which no token was drawn.
        """
        *values, norm, stepped, steps = self.sums(workers)
        seconds = time.perf_counter() - self._began
        row = {"loss": _mean(values[0], values[1])}
        for band in range(BANDS):
            row[f"loss_band_{band}"] = _mean(values[2 + band], values[2 + BANDS + band])
        row["gradient_norm"] = _mean(norm, stepped)
        row["skipped_share"] = 1.0 - _mean(stepped, steps)
        row["images_per_second"] = self._images / seconds
        row["learning_rate"] = self._rate
        self._reset()
        return row


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
