"""The channel between a training run's driver, its controller and its workers: metrics and lines for the person one way, requests to end
with a checkpoint the other, because the person, a pre-emption notice or a change of size asks for it."""

import threading
from collections.abc import Callable

from pipelines.runtime.cluster.channel import MessageChannel, Messages

STOP, PREEMPTED, RESIZED = "stop", "pre-empted", "resized"
ASKED_EVERY_SECONDS = 1.0


class _Board(Messages):
    """The actor behind `TrainingChannel`; one for all, for each takes a hundredth of a core, whatever it does."""

    def __init__(self) -> None:
        super().__init__()
        self.stopping = False  # by the person: holds for every group that starts
        self.asked = ""  # of the present group
        self.answered = False
        self.working = False  # a group is at work

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
    """Made in the driver; the controller, the workers and validations hold it too."""

    actor_class = _Board

    def ask(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and end."""
        self._actor.ask.remote(reason)

    def new_group(self) -> None:
        """A worker group begins: what the last one was asked is done with, unless the person asked."""
        self._actor.new_group.remote()

    def group_works(self, working: bool) -> None:
        """From the controller: the group has begun to train, or is broken."""
        self._actor.work.remote(working)

    def somebody_works(self) -> bool:
        """Whether there is a group that can answer."""
        import ray

        try:
            return bool(ray.get(self._actor.is_working.remote()))
        except ray.exceptions.RayError:  # with the board all is lost
            return False

    def stopping(self) -> bool:
        """Whether the person has asked the run to end."""
        import ray

        return bool(ray.get(self._actor.reason.remote()) == STOP)

    def answer(self) -> None:
        """From a worker: the checkpoint is written."""
        self._actor.answer.remote()

    def has_answer(self) -> bool:
        import ray

        return bool(ray.get(self._actor.has_answer.remote()))

    def watched(self) -> Callable[[], str]:
        """In the first worker: what is asked of the group ("" for nothing), looked up on a thread, so that no step waits for it."""
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
