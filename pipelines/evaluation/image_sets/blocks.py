"""Some images of a set, as they travel from the tasks that read them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Block:
    """Some images of a set."""

    images: np.ndarray  # uint8 (N, H, W, 3)
    index: np.ndarray  # int64 (N,): their numbers in the set
    labels: np.ndarray  # int64 (N,): −1 where unknown
