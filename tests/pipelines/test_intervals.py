"""Sums between two lines of metrics."""

import torch

from mar_model.diffusion import TokenLoss
from pipelines.intervals import Interval


def test_an_interval_leaves_out_what_is_not_finite() -> None:
    interval = Interval(torch.device("cpu"))
    timesteps = torch.tensor([10, 990])
    for value in (1.0, float("nan"), 3.0):
        loss = torch.full((2,), value)
        interval.add(TokenLoss(loss, loss, loss), timesteps, torch.tensor(value == value))
    interval.steps(8, torch.tensor(2.0), torch.tensor(1.0), 0.1)
    interval.steps(8, torch.tensor(0.0), torch.tensor(0.0), 0.2)
    row = interval.close(1)
    assert (row["loss"], row["loss_band_0"], row["loss_band_3"], row["gradient_norm"], row["learning_rate"]) == (2.0, 2.0, 2.0, 2.0, 0.2)
