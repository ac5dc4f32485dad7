"""What training knows of validations: the protocol that `pipelines.evaluation.validation` implements."""

from typing import TYPE_CHECKING, Protocol

from pipelines.training.supervision.channel import TrainingChannel

if TYPE_CHECKING:
    from ray.train import ValidationConfig


class Validator(Protocol):
    """Validates checkpoints while a run trains, on resources beside the training workers."""

    @property
    def metric(self) -> str:
        """The name of the metric that it finds, as `train.keep_best` and MLflow know it."""

    @property
    def identity(self) -> str:
        """Validations of the same identity find comparable values."""

    def config(self, channel: TrainingChannel) -> "ValidationConfig":
        """What Ray Train runs for a checkpoint, and on which resources. Results go to the driver through `channel`."""
