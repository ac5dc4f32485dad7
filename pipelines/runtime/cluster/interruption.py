"""Ctrl-C and SIGTERM in the driver: they are raised where that does no harm; the work is asked to end, and is waited for."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPORT_SECONDS = 0.05  # between looks at whether an import has ended
ANSWER_SECONDS = 1.0  # between looks at whether anybody is left who could end as he was asked to
LAST_WORD_SECONDS = 5.0  # for work that is just giving up to say why


class Terminated(SystemExit):
    """SIGTERM. Unwinds as KeyboardInterrupt does, so that what was started is stopped."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def raised(waiting: list[int] | None = None) -> Iterator[None]:
    """In the body Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated, but never during an import, where libraries may take
    the exception for an error of their own. The first signal in `waiting` (see `held_back`) is raised immediately."""
    with _handled_by(_raise):
        if waiting:
            signal.raise_signal(waiting.pop())
        yield


@contextmanager
def held_back() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are not raised before the body has ended; a second signal is raised immediately. Yields the list of signals
    that wait, for `raised`."""
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            _raise(number, frame)

    try:
        with _handled_by(note):
            yield arrived
    finally:
        if arrived:
            signal.raise_signal(arrived[0])


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as by `nohup`, and a shell's `&`
    before: dict[Any, Any] = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def _raise(number: int, frame: FrameType | None) -> None:
    if _imports(frame):
        threading.Timer(IMPORT_SECONDS, os.kill, (os.getpid(), number)).start()
        return
    if number == signal.SIGTERM:
        raise Terminated
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def finish_when_asked(
    work: Callable[[], object], ask: Callable[[], None] | None = None, somebody_works: Callable[[], bool] = lambda: True
) -> BaseException | None:
    """Run `work` on a thread. Ctrl-C or SIGTERM calls `ask`, once, and waits for the work to end of its own accord, as long as there is
    somebody who works and so can hear of it; a second one leaves at once, as the first does without `ask`. Returns the first
    (KeyboardInterrupt, SystemExit), None if there was none; raises what the work raised.

    On the main thread Ray Train's `fit` would put a handler of its own in the place of Ctrl-C's, and leave it there.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        ended.set()

    ended = Event()  # a join that a signal interrupts takes the thread for ended from then on
    Thread(target=run, name="training", daemon=True).start()
    interruption: BaseException | None = None
    try:
        ended.wait()
    except (KeyboardInterrupt, SystemExit) as asked:
        if ask is None:
            raise
        interruption = asked
        ask()
        while not ended.wait(ANSWER_SECONDS):
            if not somebody_works():
                ended.wait(LAST_WORD_SECONDS)
                break
    if errors:
        raise errors[0]
    return interruption
