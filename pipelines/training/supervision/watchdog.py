"""Ends a worker that makes no step any more, although its process lives and answers: reading from a file system that is gone, say."""

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

PATIENCE = 1.25  # times train.hang_seconds: who waits for another in a collective, or doesn't answer Ray, is found before
OWN = str(Path(__file__).parents[3])  # frames of this project say more than those below them


class Watchdog:
    """A context manager for the thread that trains: when `seconds` have gone by since a call of `stepped`, `say` is told where that
    thread is, and the process is killed, so that Ray starts the group again. Nothing is watched before the first step, which may compile
    and fetch shards, nor from `rests` to the next step: a checkpoint may have to wait for a slow store."""

    def __init__(self, name: str, seconds: float, say: Callable[[str], None]) -> None:
        self.name, self.seconds, self.say = name, seconds, say
        self._last, self._over = math.inf, threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, args=(threading.get_ident(),), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def stepped(self) -> None:
        """The thread is alive."""
        self._last = time.monotonic()

    def rests(self) -> None:
        """The thread is about to do what may take any time."""
        self._last = math.inf

    def _watch(self, thread: int) -> None:
        while not self._over.wait(self.seconds / 20):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                with contextlib.suppress(Exception):
                    self.say(f"{self.name} hangs: no step for {silent:.0f} s, {_where(thread)}; it is ended")
                    time.sleep(1)  # until that is told
                os.kill(os.getpid(), signal.SIGKILL)


def _where(thread: int) -> str:
    """What a thread is doing: the innermost function of this project."""
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame else []
    own = [one for one in stack if one.filename.startswith(OWN)] or stack
    return f"in {own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else "its thread is gone"
