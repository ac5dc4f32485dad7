"""Requests to a running worker group: end with a checkpoint, because the person, a pre-emption notice or a change of size asks for it."""

import threading
from collections.abc import Callable
from typing import Any

from pipelines.progress import on_this_node

STOP, PREEMPTED, RESIZED = "stop", "pre-empted", "resized"
ASKED_EVERY_SECONDS = 1.0


class _Board:
    """The actor behind `Requests`."""

    def __init__(self) -> None:
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


class Requests:
    """Made in the driver; the controller and the first worker hold it too."""

    def __init__(self) -> None:
        import ray

        self._board: Any = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=on_this_node()).remote()

    def ask(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and end."""
        self._board.ask.remote(reason)

    def new_group(self) -> None:
        """A worker group begins: what the last one was asked is done with, unless the person asked."""
        self._board.new_group.remote()

    def group_works(self, working: bool) -> None:
        """From the controller: the group has begun to train, or is broken."""
        self._board.work.remote(working)

    def somebody_works(self) -> bool:
        """Whether there is a group that can answer."""
        import ray

        try:
            return bool(ray.get(self._board.is_working.remote()))
        except ray.exceptions.RayError:  # with the board all is lost
            return False

    def stopping(self) -> bool:
        """Whether the person has asked the run to end."""
        import ray

        return bool(ray.get(self._board.reason.remote()) == STOP)

    def answer(self) -> None:
        """From a worker: the checkpoint is written."""
        self._board.answer.remote()

    def has_answer(self) -> bool:
        import ray

        return bool(ray.get(self._board.has_answer.remote()))

    def watched(self) -> Callable[[], str]:
        """In the first worker: what is asked of the group ("" for nothing), looked up on a thread, so that no step waits for it."""
        import ray

        found = [""]

        def watch() -> None:
            while not found[0]:
                try:
                    found[0] = ray.get(self._board.reason.remote())
                except ray.exceptions.RayError:  # the run has ended
                    return
                ended.wait(ASKED_EVERY_SECONDS)

        ended = threading.Event()
        threading.Thread(target=watch, name="requests", daemon=True).start()
        return lambda: found[0]
