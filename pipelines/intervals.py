"""What a line of metrics says: sums over the steps since the line before."""

import time

import torch
from torch import Tensor

from mar_model.diffusion import TokenLoss
from mar_model.recipe import BANDS, band_sums


class Interval:
    """Sums over the steps between two lines of metrics; nothing is read from the device until the line is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros(2, device=self.device, dtype=torch.float64)
        self._bands = torch.zeros(2, BANDS, device=self.device, dtype=torch.float64)
        self._norm = torch.zeros(2, device=self.device, dtype=torch.float64)
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
        self._norm += torch.stack([gradient_norm, stepped])
        self._rate = rate

    def sums(self, workers: int) -> list[float]:
        """The interval so far, summed over all workers (every worker must call it), for a checkpoint that comes in its midst."""
        totals = torch.cat([self._loss, self._bands.flatten()])
        if workers > 1:
            torch.distributed.all_reduce(totals)
        return [*totals.tolist(), *self._norm.tolist()]

    def go_on(self, sums: list[float], worker: int) -> None:
        """Go on with an interval that a checkpoint came in the midst of; images a second count from here."""
        if worker == 0:
            self._loss += torch.tensor(sums[:2], device=self.device, dtype=torch.float64)
            self._bands += torch.tensor(sums[2:-2], device=self.device, dtype=torch.float64).view(2, BANDS)
        self._norm += torch.tensor(sums[-2:], device=self.device, dtype=torch.float64)

    def close(self, workers: int) -> dict[str, float]:
        """The interval's line, summed over all workers (every worker must call it), and a new interval."""
        *values, norm, stepped = self.sums(workers)
        seconds = time.perf_counter() - self._began
        row = {"loss": values[0] / values[1] if values[1] else float("nan")}
        for band in range(BANDS):
            row[f"loss_band_{band}"] = values[2 + band] / max(values[2 + BANDS + band], 1.0)
        row["gradient_norm"] = norm / max(stepped, 1.0)
        row["images_per_second"] = self._images / seconds
        row["learning_rate"] = self._rate
        self._reset()
        return row
