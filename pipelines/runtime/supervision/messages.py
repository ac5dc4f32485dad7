"""Messages from a training run's workers, controller and validations to its driver, which matches them by type."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupFailed:
    """A worker group failed or did not start, at `at` (Unix seconds); Ray Train starts another. `text` is a line for the user."""

    text: str
    at: float


@dataclass(frozen=True)
class PassedOver:
    """A worker found a damaged checkpoint and tries an older one. `text` is a line for the user."""

    text: str


@dataclass(frozen=True)
class Started:
    """A worker group of `workers` has finished its first step, at `images_seen` images. Unix seconds: processes started, checkpoint loaded,
    step finished."""

    images_seen: int
    workers: int
    began: float
    resumed: float
    stepped: float


@dataclass(frozen=True)
class Validated:
    """A validation of the checkpoint at `images_seen` finished after `seconds`; `picture` is the path of its sample grid."""

    images_seen: int
    metrics: dict[str, float]
    picture: str
    seconds: float
