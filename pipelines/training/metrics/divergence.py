"""Detects from a training run's summary whether it diverged: by the skipped (non-finite) steps and the last loss."""

import math
from collections.abc import Mapping
from typing import Any

SKIPPED_LIMIT = 0.05  # share of a run's steps; with more skipped steps the metrics do not represent the settings


def skipped_steps(summary: Mapping[str, Any]) -> str:
    """The number of skipped steps in words; empty if there were none, or if the summary does not contain it."""
    if not summary.get("steps_skipped"):
        return ""
    skipped, steps = summary["steps_skipped"], summary["steps"]
    return f"{skipped:,} of {steps:,} steps ({skipped / steps:.1%}) were skipped because a loss or gradient was not finite"


def diverged(summary: Mapping[str, Any]) -> str:
    """Why the run counts as diverged; empty if it does not. None (null in a file) counts as not finite."""
    loss = summary.get("loss")
    if loss is None or not math.isfinite(loss):
        skipped = skipped_steps(summary)
        return f"training diverged: no loss of its last interval is finite{f'; {skipped}' if skipped else ''}"
    if summary.get("steps_skipped", 0) > SKIPPED_LIMIT * summary.get("steps", 0):
        return f"training diverged: {skipped_steps(summary)}, expected at most {SKIPPED_LIMIT:.0%}"
    return ""
