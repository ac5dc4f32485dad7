"""Training's interface to validation: the protocol that `pipelines.evaluation.validation` implements."""

from typing import TYPE_CHECKING, Protocol

from pipelines.runtime.supervision.channel import TrainingChannel

if TYPE_CHECKING:
    from ray.train import ValidationConfig


class Validator(Protocol):
    """Validates checkpoints during training, on separate resources."""

    @property
    def metric(self) -> str:
        """Name of the metric, for `train.keep_best` and MLflow."""

    @property
    def identity(self) -> str:
        """Values of validations with the same identity are comparable."""

    def config(self, channel: TrainingChannel) -> "ValidationConfig":
        """The validation function and its resources for Ray Train. Results are sent to the driver through `channel`."""
