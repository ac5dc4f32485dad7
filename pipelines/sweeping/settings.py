"""Section `sweep` of the configuration."""

from dataclasses import dataclass
from typing import Any, Literal

from pipelines.runtime.settings import Count, Whole, identity, operational


@dataclass
class SweepSettings:
    """Section `sweep`."""

    path: str = operational("runs/mar/sweep", "directory of the sweep: trials/, table.json, sweep.png")
    over: Literal["train", "generate"] = identity("generate", "train (each trial trains) or generate (trials draw from one checkpoint)")
    parameters: dict[str, list[Any]] = identity(help="grid: section.key → values, e.g. {generate.temperature: [0.9, 1.0]}", factory=dict)
    metric: str = identity("frechet_distance", "what is compared: a metric of the evaluation, or loss")
    mode: Literal["min", "max"] = identity("min", "min or max")
    images: Count = identity(1000, "samples a trial draws for its metric")
    concurrent: Whole = operational(0, "trials at once; 0: as many as the cluster's CPUs or GPUs hold")
