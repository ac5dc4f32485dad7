"""The figures of an interval: means over finite values alone, and NaN where there are none."""

import math

import torch

from mar_model.head.diffusion import TokenLoss
from pipelines.training.metrics.intervals import Interval


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
    assert row["skipped_share"] == 0.5
    assert math.isnan(row["loss_band_1"])  # no token had a timestep of that band


def test_a_mean_over_nothing_is_not_a_number() -> None:
    interval = Interval(torch.device("cpu"))
    loss = torch.full((2,), float("nan"))
    interval.add(TokenLoss(loss, loss, loss), torch.tensor([10, 990]), torch.tensor(False))
    interval.steps(8, torch.tensor(0.0), torch.tensor(0.0), 0.1)
    resumed = Interval(torch.device("cpu"))
    resumed.go_on(interval.sums(1), worker=0)
    for one in (interval, resumed):
        row = one.close(1)
        means = [row[name] for name in ("loss", "loss_band_0", "loss_band_1", "loss_band_2", "loss_band_3", "gradient_norm")]
        assert all(math.isnan(mean) for mean in means), means
        assert (row["skipped_share"], row["learning_rate"]) == (1.0, 0.1 if one is interval else 0.0)


def test_an_interval_resumes_from_a_checkpoint_that_does_not_count_skipped_steps() -> None:
    interval = Interval(torch.device("cpu"))
    interval.go_on([6.0, 3.0, *[1.0, 2.0, 3.0, 4.0], *[1.0, 1.0, 1.0, 2.0], 8.0, 2.0], worker=0)
    row = interval.close(1)
    assert (row["loss"], row["loss_band_0"], row["loss_band_3"], row["gradient_norm"], row["skipped_share"]) == (2.0, 1.0, 2.0, 4.0, 0.0)
