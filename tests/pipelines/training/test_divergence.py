"""When a training run counts as diverged: by its last loss and by the share of its steps that were skipped."""

import math

import pytest

from pipelines.training.metrics.divergence import diverged, skipped_steps


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_run_without_a_finite_last_loss_diverged(loss: float | None) -> None:
    assert diverged({"loss": loss, "steps": 4, "steps_skipped": 3}) == (
        "training diverged: no loss of its last interval is finite; 3 of 4 steps (75.0%) were skipped because a loss or gradient was not "
        "finite"
    )
    assert diverged({"loss_band_3": 0.0}) == "training diverged: no loss of its last interval is finite"  # of an earlier version


def test_a_run_that_skipped_more_than_a_twentieth_of_its_steps_diverged() -> None:
    assert diverged({"loss": 0.5, "steps": 1000, "steps_skipped": 50}) == ""
    assert skipped_steps({"loss": 0.5, "steps": 1000, "steps_skipped": 50}).startswith("50 of 1,000 steps (5.0%) were skipped")
    assert diverged({"loss": 0.5, "steps": 1000, "steps_skipped": 51}) == (
        "training diverged: 51 of 1,000 steps (5.1%) were skipped because a loss or gradient was not finite, expected at most 5%"
    )
    assert (diverged({"loss": 0.5}), skipped_steps({"loss": 0.5}), skipped_steps({"steps": 9, "steps_skipped": 0})) == ("", "", "")
