"""What a feature network gives for an image, and how large each part is."""

from typing import NamedTuple

import numpy as np

DIMENSIONS = {"inception": 2048, "efficientnet-lite0": 1280, "dinov2": 1024}  # pooled features
SPATIAL = {"inception": 17 * 17 * 7, "efficientnet-lite0": 7 * 7 * 7, "dinov2": 0}
LOGITS = {"inception": 1008, "efficientnet-lite0": 1000, "dinov2": 0}
SPATIAL_CHANNELS = 7
CPU_CHUNK = 8  # images a pass on a CPU: larger activations leave the cache and cost a third more


class Features(NamedTuple):
    """Of N images, all float32."""

    pooled: np.ndarray  # (N, DIMENSIONS)
    spatial: np.ndarray  # (N, SPATIAL): the first channels of a layer in the middle, flattened height, width, channel
    logits: np.ndarray  # (N, LOGITS), of the classes of ImageNet; 0 wide, as spatial, if the network has none
