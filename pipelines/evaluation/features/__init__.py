"""Feature networks: what metrics compare images by."""

from typing import Protocol

import numpy as np
import torch

from pipelines.evaluation.features import dinov2, efficientnet, inception
from pipelines.evaluation.features.dinov2 import DINOv2
from pipelines.evaluation.features.efficientnet import EfficientNetLite0
from pipelines.evaluation.features.inception import Inception
from pipelines.evaluation.features.sizes import DIMENSIONS, LOGITS, SPATIAL, Features
from pipelines.runtime.errors import UserError

__all__ = [
    "DIMENSIONS",
    "LOGITS",
    "SPATIAL",
    "DINOv2",
    "EfficientNetLite0",
    "FeatureNetwork",
    "Features",
    "Inception",
    "load_network",
    "network_digest",
]


class FeatureNetwork(Protocol):
    """Images to vectors. The same images give the same features up to rounding, in whatever batches they come."""

    name: str
    digest: str  # SHA-256 of the weights
    dimension: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) → pooled features, float32 (N, dimension)."""

    def features(self, images: np.ndarray) -> Features:
        """Everything that metrics need, from one pass of the network over uint8 images (N, H, W, 3)."""


def load_network(name: str, weights: str, device: torch.device) -> FeatureNetwork:
    """The network `efficientnet-lite0` (embedded), `inception` or `dinov2` (from the file `weights`), ready to use.

    Raises UserError as `network_digest` does.
    """
    _check_name(name)
    if name == "inception":
        return Inception(weights, device)
    return DINOv2(weights, device) if name == "dinov2" else EfficientNetLite0(device)


def network_digest(name: str, weights: str) -> str:
    """SHA-256 of a network's weights, without building it.

    Raises UserError when the weights are missing or are not the published ones, and for an unknown name.
    """
    _check_name(name)
    if name == "inception":
        return inception.weights_digest(weights)
    return dinov2.weights_digest(weights) if name == "dinov2" else efficientnet.weights_digest()


def _check_name(name: str) -> None:
    if name not in DIMENSIONS:
        raise UserError(f"evaluate.features is {name!r}, expected {', '.join(DIMENSIONS)}")
