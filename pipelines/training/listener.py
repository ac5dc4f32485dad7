"""The driver's side of a training run: what it does with each message of the workers, the controller and validations."""

from collections.abc import Callable
from typing import Any

from pipelines.runtime.cluster.channel import Metrics, Said
from pipelines.training.supervision.messages import GroupFailed, PassedOver, Started, Validated


class Listener:
    """Passes messages on: an interval's metrics to `on_metrics`, a validation's result to `on_validation`, lines for the user to `say`,
    lines about damaged checkpoints to `passed_over`. `last` holds the newest metrics."""

    def __init__(
        self,
        workers: int,
        on_metrics: Callable[[dict[str, Any]], None],
        on_validation: Callable[[Validated], None],
        say: Callable[[str], None],
        passed_over: Callable[[str], None],
    ) -> None:
        """`workers`: the number that the settings ask for; a group of another size is reported."""
        self.workers, self.on_metrics, self.on_validation, self.say, self.passed_over = workers, on_metrics, on_validation, say, passed_over
        self.last: dict[str, Any] = {}
        self._failed_at: float | None = None  # when a group failed that no other has replaced yet

    def receive(self, message: object) -> None:
        """Handle one message."""
        match message:
            case Said(text):
                self.say(text)
            case GroupFailed(text, at):
                self.say(text)
                self._failed_at = self._failed_at or at
            case PassedOver(text):
                self.passed_over(text)
            case Started():
                if self._failed_at is not None or message.workers != self.workers:
                    self.say(f"{message.workers} workers at work again, {message.images_seen:,} images seen{self._took(message)}")
                self._failed_at = None
            case Validated():
                self.on_validation(message)
            case Metrics(values):
                self.last.update(values)
                self.on_metrics(values)
            case _:
                raise TypeError(f"a training run sent {type(message).__name__}, which nothing handles")

    def _took(self, started: Started) -> str:
        """How long the restart took; it ends with the first step."""
        if self._failed_at is None:
            return ""
        return (
            f" ({started.stepped - self._failed_at:.1f} s later: {started.began - self._failed_at:.1f} s to start them, "
            f"{started.resumed - started.began:.1f} s to load, {started.stepped - started.resumed:.1f} s for a step)"
        )
