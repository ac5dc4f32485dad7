"""Kills a worker that makes no progress although its process answers, e.g. while it reads from an unreachable file system."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

PATIENCE = 1.25  # times the setting hang_seconds: a hang in a collective, or a worker that does not answer Ray, is detected earlier
OWN = str(Path(__file__).parents[3])  # frames of this project are more informative than library frames


class Watchdog:
    """A context manager for the training thread. If `stepped` is not called for `seconds`, `say` prints its position, and the process
    is killed, so that Ray restarts the group. Time does not count before the first step, which may compile and fetch shards, nor after
    `rests` until the next step: a checkpoint may have to wait for slow storage."""

    def __init__(self, name: str, seconds: float, say: Callable[[str], None]) -> None:
        self.name, self.seconds, self.say = name, seconds, say
        self._last, self._over = math.inf, threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, args=(threading.get_ident(),), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def stepped(self) -> None:
        """Called after each step."""
        self._last = time.monotonic()

    def rests(self) -> None:
        """Called before an operation that may take any time."""
        self._last = math.inf

    def _watch(self, thread: int) -> None:
        while not self._over.wait(self.seconds / 20):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                with contextlib.suppress(Exception):
                    self.say(f"{self.name} hangs: no step for {silent:.0f} s, {_where(thread)}; killing it")
                    time.sleep(1)  # until the message is sent
                os.kill(os.getpid(), signal.SIGKILL)


def _where(thread: int) -> str:
    """The current position of a thread: the innermost function of this project."""
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame else []
    own = [entry for entry in stack if entry.filename.startswith(OWN)] or stack
    return f"in {own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else "its thread is gone"
