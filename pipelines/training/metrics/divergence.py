"""Whether a training run diverged, by its summary: steps that were skipped because a loss or gradient was not finite, and the last loss."""

import math
from collections.abc import Mapping
from typing import Any

SKIPPED_LIMIT = 0.05  # share of a run's steps; with more of them skipped its metrics are no longer those of its settings


def skipped_steps(summary: Mapping[str, Any]) -> str:
    """How many steps of the run were skipped; empty where none was, or where the summary does not say."""
    if not summary.get("steps_skipped"):
        return ""
    skipped, steps = summary["steps_skipped"], summary["steps"]
    return f"{skipped:,} of {steps:,} steps ({skipped / steps:.1%}) were skipped because a loss or gradient was not finite"


def diverged(summary: Mapping[str, Any]) -> str:
    """Why the run's metrics say nothing about its settings; empty where they do. None (null in a file) counts as not finite."""
    loss = summary.get("loss")
    if loss is None or not math.isfinite(loss):
        skipped = skipped_steps(summary)
        return f"training diverged: no loss of its last interval is finite{f'; {skipped}' if skipped else ''}"
    if summary.get("steps_skipped", 0) > SKIPPED_LIMIT * summary.get("steps", 0):
        return f"training diverged: {skipped_steps(summary)}, and at most {SKIPPED_LIMIT:.0%} may be"
    return ""
