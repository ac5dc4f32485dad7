"""Feature networks: what metrics compare images by. The module of a network is imported when the network is used."""

from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipelines.evaluation.features.sizes import DIMENSIONS, Features
from pipelines.runtime.errors import UserError

if TYPE_CHECKING:
    import torch


class FeatureNetwork(Protocol):
    """Images to vectors. The same images give the same features up to rounding, in whatever batches they come."""

    name: str
    digest: str  # SHA-256 of the weights
    dimension: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) → pooled features, float32 (N, dimension)."""

    def features(self, images: np.ndarray) -> Features:
        """Everything that metrics need, from one pass of the network over uint8 images (N, H, W, 3)."""


def load_network(name: str, weights: str, device: "torch.device") -> FeatureNetwork:
    """The network `efficientnet-lite0` (embedded), `inception` or `dinov2` (from the file `weights`), ready to use.

    Raises UserError as `network_digest` does.
    """
    _check_name(name)
    if name == "inception":
        from pipelines.evaluation.features.inception import Inception

        return Inception(weights, device)
    if name == "dinov2":
        from pipelines.evaluation.features.dinov2 import DINOv2

        return DINOv2(weights, device)
    from pipelines.evaluation.features.efficientnet import EfficientNetLite0

    return EfficientNetLite0(device)


def network_digest(name: str, weights: str) -> str:
    """SHA-256 of a network's weights, without building it.

    Raises UserError when the weights are missing or are not the published ones, and for an unknown name.
    """
    _check_name(name)
    if name == "inception":
        from pipelines.evaluation.features import inception

        return inception.weights_digest(weights)
    if name == "dinov2":
        from pipelines.evaluation.features import dinov2

        return dinov2.weights_digest(weights)
    from pipelines.evaluation.features import efficientnet

    return efficientnet.weights_digest()


def _check_name(name: str) -> None:
    if name not in DIMENSIONS:
        raise UserError(f"evaluate.features is {name!r}, expected {', '.join(DIMENSIONS)}")
