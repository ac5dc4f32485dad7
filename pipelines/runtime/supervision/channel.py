"""The channel between a training run's driver, its controller and its workers. It carries metrics and lines for the user to the driver, and
requests to stop with a checkpoint to the workers: from the user, after a pre-emption notice, or to change the number of workers."""

import threading
from collections.abc import Callable

from pipelines.runtime.cluster.channel import MessageChannel, Messages

STOP, PREEMPTED, RESIZED = "stop", "pre-empted", "resized"
ASKED_EVERY_SECONDS = 1.0


class _Board(Messages):
    """The actor behind `TrainingChannel`. All users share a single actor, because each actor costs a hundredth of a core."""

    def __init__(self) -> None:
        super().__init__()
        self.stopping = False  # requested by the user: holds for all later groups too
        self.asked = ""  # request to the current group
        self.answered = False
        self.working = False  # a group is training

    def ask(self, reason: str) -> None:
        self.stopping |= reason == STOP
        self.asked, self.answered = reason, False

    def reason(self) -> str:
        return STOP if self.stopping else self.asked

    def answer(self) -> None:
        self.answered = True

    def has_answer(self) -> bool:
        return self.answered

    def new_group(self) -> None:
        self.asked, self.answered, self.working = "", False, False

    def work(self, working: bool) -> None:
        self.working = working

    def is_working(self) -> bool:
        return self.working


class TrainingChannel(MessageChannel):
    """Created in the driver; the controller, the workers and validations hold a copy."""

    actor_class = _Board

    def ask(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and stop."""
        self._actor.ask.remote(reason)

    def new_group(self) -> None:
        """A worker group starts: discard the request to the previous group, unless it was the user's."""
        self._actor.new_group.remote()

    def group_works(self, working: bool) -> None:
        """From the controller: the group has started training, or has failed."""
        self._actor.work.remote(working)

    def somebody_works(self) -> bool:
        """Whether a group is running that can answer."""
        import ray

        try:
            return bool(ray.get(self._actor.is_working.remote()))
        except ray.exceptions.RayError:  # the actor has died, and the run with it
            return False

    def stopping(self) -> bool:
        """Whether the user has asked the run to stop."""
        import ray

        return bool(ray.get(self._actor.reason.remote()) == STOP)

    def answer(self) -> None:
        """From a worker: the checkpoint is written."""
        self._actor.answer.remote()

    def has_answer(self) -> bool:
        import ray

        return bool(ray.get(self._actor.has_answer.remote()))

    def watched(self) -> Callable[[], str]:
        """On rank 0: a function that returns the request to the group ("" for none). A thread polls it, so that no step waits."""
        import ray

        found = [""]

        def watch() -> None:
            while not found[0]:
                try:
                    found[0] = ray.get(self._actor.reason.remote())
                except ray.exceptions.RayError:  # the run has ended
                    return
                ended.wait(ASKED_EVERY_SECONDS)

        ended = threading.Event()
        threading.Thread(target=watch, name="requests", daemon=True).start()
        return lambda: found[0]
