"""Arguments of the training workers."""

from dataclasses import asdict, dataclass

from mar_model.config import MARConfig
from mar_model.version import __version__
from pipelines.caching.latent_cache import LatentCache
from pipelines.checkpoints.fine_tuning import Start
from pipelines.checkpoints.run import CheckpointedRun, Retention
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.supervision.channel import TrainingChannel
from pipelines.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainingJob:
    """Arguments of each training worker."""

    model: MARConfig
    train: TrainSettings
    cache: LatentCache
    tokenizer_path: str
    seed: int
    cluster: ClusterSettings
    channel: TrainingChannel
    start: Start | None  # initial weights for fine-tuning
    validated_as: str = ""  # identity of validations: only values of the same identity are comparable

    def checkpointed(self) -> CheckpointedRun:
        """The run's description for its checkpoints."""
        manifest, train = self.cache.manifest, self.train
        about = {
            "seed": self.seed,
            "code_version": __version__,
            "train": asdict(train),
            "cache_digest": self.cache.digest,
            "tokenizer": {"path": self.tokenizer_path, "digest": manifest.tokenizer["digest"]},
            "class_names": manifest.class_names,
            "image_size": manifest.image_size,
            **{name: getattr(manifest, name) for name in ("latent_mean", "latent_std", "latent_min", "latent_max")},
        }
        retention = Retention(train.checkpoints_kept, train.keep_every_images, train.keep_best, self.validated_as)
        return CheckpointedRun(train.path, self.model, about, retention)
