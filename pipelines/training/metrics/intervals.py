"""A row of metrics: sums over the steps since the previous row."""

import math
import time

import torch
from torch import Tensor

from mar_model.head.diffusion import TokenLoss
from mar_model.training.recipe import BANDS, band_sums

SUMS = 2 + 2 * BANDS + 3  # numbers that `Interval.sums` returns


class Interval:
    """Sums over the steps between two rows of metrics; nothing is read from the device before the row is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros(2, device=self.device, dtype=torch.float64)
        self._bands = torch.zeros(2, BANDS, device=self.device, dtype=torch.float64)
        self._norm = torch.zeros(3, device=self.device, dtype=torch.float64)  # sum of the norms, steps taken, all steps
        self._images, self._rate = 0, 0.0
        self._began = time.perf_counter()

    def add(self, loss: TokenLoss, timesteps: Tensor, finite: Tensor) -> None:
        """Add one micro-batch; it is left out if its loss is not finite."""
        tokens = loss.total.new_full((), loss.total.numel())  # filled on the device: a copy from the host would synchronise
        sums = torch.stack([loss.total.detach().sum(), tokens])
        self._loss += torch.where(finite, sums, 0.0)
        self._bands += torch.where(finite, band_sums(loss.mse, timesteps), 0.0)

    def steps(self, images: int, gradient_norm: Tensor, stepped: Tensor, rate: float) -> None:
        """Add one optimizer step over `images` images of the global batch; the norm of a skipped step is 0."""
        self._images += images
        self._norm += torch.stack([gradient_norm, stepped, torch.ones_like(stepped)])
        self._rate = rate

    def sums(self, workers: int) -> list[float]:
        """Sums of the interval so far over all workers, for a checkpoint inside the interval. All workers must call it."""
        totals = torch.cat([self._loss, self._bands.flatten()])
        if workers > 1:
            torch.distributed.all_reduce(totals)
        return [*totals.tolist(), *self._norm.tolist()]

    def go_on(self, sums: list[float], worker: int) -> None:
        """Resume an interval from the sums in a checkpoint; images per second count from here."""
        if len(sums) < SUMS:  # of an earlier version, which did not count skipped steps
            sums = [*sums, sums[-1]]
        if worker == 0:
            self._loss += torch.tensor(sums[:2], device=self.device, dtype=torch.float64)
            self._bands += torch.tensor(sums[2:-3], device=self.device, dtype=torch.float64).view(2, BANDS)
        self._norm += torch.tensor(sums[-3:], device=self.device, dtype=torch.float64)

    def close(self, workers: int) -> dict[str, float]:
        """The interval's row, over all workers, and the start of a new interval. All workers must call it.

        A mean over nothing is NaN: loss and norm if no step was finite, a band without a token.
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
