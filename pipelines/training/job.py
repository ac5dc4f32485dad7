"""What each training worker is given."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mar_model.config import MARConfig
from pipelines.caching.latent_cache import LatentCache
from pipelines.checkpoints.fine_tuning import Start
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.training.supervision.channel import TrainingChannel

if TYPE_CHECKING:
    from pipelines.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainingJob:
    """All that a worker needs to know."""

    model: MARConfig
    train: "TrainSettings"
    cache: LatentCache
    tokenizer_path: str
    seed: int
    cluster: ClusterSettings
    channel: TrainingChannel
    start: Start | None  # of a run that is fine-tuning
    validated_as: str = ""  # what makes the distances of two validations comparable
