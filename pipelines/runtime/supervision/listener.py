"""The driver's side of a training run: handles the messages of workers, controller and validations."""

from collections.abc import Callable
from typing import Any

from pipelines.runtime.cluster.channel import Metrics, Said
from pipelines.runtime.supervision.messages import GroupFailed, PassedOver, Started, Validated


class Listener:
    """Dispatches messages: metrics of an interval to `on_metrics`, validation results to `on_validation`, lines for the user to `say`, and
    lines about damaged checkpoints to `passed_over`. `last` holds the latest metrics."""

    def __init__(
        self,
        workers: int,
        on_metrics: Callable[[dict[str, Any]], None],
        on_validation: Callable[[Validated], None],
        say: Callable[[str], None],
        passed_over: Callable[[str], None],
    ) -> None:
        """`workers`: the configured number of workers; a group of another size is reported."""
        self.workers, self.on_metrics, self.on_validation, self.say, self.passed_over = workers, on_metrics, on_validation, say, passed_over
        self.last: dict[str, Any] = {}
        self._failed_at: float | None = None  # time of a group failure, until another group runs

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
                    self.say(f"{message.workers} workers running again, {message.images_seen:,} images seen{self._took(message)}")
                self._failed_at = None
            case Validated():
                self.on_validation(message)
            case Metrics(values):
                self.last.update(values)
                self.on_metrics(values)
            case _:
                raise TypeError(f"a training run sent {type(message).__name__}, expected a known message type")

    def _took(self, started: Started) -> str:
        """Duration of the restart, up to the end of the first step."""
        if self._failed_at is None:
            return ""
        return (
            f" ({started.stepped - self._failed_at:.1f} s later: {started.began - self._failed_at:.1f} s to start the processes, "
            f"{started.resumed - started.began:.1f} s to load the checkpoint, {started.stepped - started.resumed:.1f} s for the first step)"
        )
