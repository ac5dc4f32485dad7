"""What each worker that trains a tokenizer is given."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.images.listing import ImageListing
from pipelines.images.settings import ImageSettings
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.supervision.channel import TrainingChannel
from pipelines.tokenizing.settings import TokenizerSettings

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class TokenizerJob:
    """All that a worker needs to know."""

    images: ImageSettings
    tokenizer: "TokenizerSettings"
    listing: "ObjectRef[ImageListing]"
    seed: int
    cluster: ClusterSettings
    channel: TrainingChannel
