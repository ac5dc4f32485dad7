"""The evaluation record: its files, its fields and the definitions of its metrics."""

from dataclasses import dataclass
from typing import Any

from pipelines.runtime.errors import UserError

STATISTICS, RECORD, PICTURE = "statistics.npz", "evaluation.json", "samples.png"

DEFINITIONS = {
    "fid": "Fréchet distance of Inception-v3's 2,048 pooled features (arXiv 1706.08500), weights of 2015, images as drawn",
    "frechet_distance_efficientnet-lite0": "Fréchet distance of EfficientNet-Lite0's 1,280 pooled features; not comparable with FID",
    "label_agreement": "share of samples that the classifier assigns to the class they were drawn for",
}


def metric_name(features: str) -> str:
    """What a Fréchet distance is called, by its feature network: only Inception's is the FID."""
    return "fid" if features == "inception" else f"frechet_distance_{features}"


def check_count(setting: str, images: int) -> None:
    """Raise UserError for a number of samples that has no covariance."""
    if images < 2:
        raise UserError(f"{setting} is {images}, expected 2 or more: one image has no covariance")


@dataclass(frozen=True)
class Record:
    """What is read again of `evaluation.json`."""

    images: int
    identity: dict[str, Any]
