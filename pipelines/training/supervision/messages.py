"""What a training run's workers, controller and validations send to its driver; the driver matches messages by type."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupFailed:
    """A worker group failed, or did not start, at `at` (Unix seconds); Ray Train starts another. `text` is a line for the user."""

    text: str
    at: float


@dataclass(frozen=True)
class PassedOver:
    """A worker found a damaged checkpoint and looks for an older one. `text` is a line for the user."""

    text: str


@dataclass(frozen=True)
class Started:
    """A worker group of `workers` took its first step, after `images_seen` images. Times are Unix seconds: when the processes began, when
    the checkpoint was loaded, and when the step ended."""

    images_seen: int
    workers: int
    began: float
    resumed: float
    stepped: float


@dataclass(frozen=True)
class Validated:
    """A validation of the checkpoint at `images_seen` ended after `seconds`; `picture` is the path of its sample grid."""

    images_seen: int
    metrics: dict[str, float]
    picture: str
    seconds: float
