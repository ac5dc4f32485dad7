"""Ctrl-C and SIGTERM in the driver: raise them at safe points, ask the running work to stop, and wait for it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPORT_SECONDS = 0.05  # interval between checks whether an import has finished
ANSWER_SECONDS = 1.0  # interval between checks whether any worker is still running
LAST_WORD_SECONDS = 5.0  # time for failing work to report its error


class Terminated(SystemExit):
    """SIGTERM. It unwinds the stack as KeyboardInterrupt does, so that started processes are stopped."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def raised(waiting: list[int] | None = None) -> Iterator[None]:
    """In the body, Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated, but not during an import, where libraries may treat the
    exception as an import error. The first signal in `waiting` (see `held_back`) is raised immediately."""
    with _handled_by(_raise):
        if waiting:
            signal.raise_signal(waiting.pop())
        yield


@contextmanager
def held_back() -> Iterator[list[int]]:
    """Delay Ctrl-C and SIGTERM until the body has ended; a second signal is raised immediately. Yields the list of delayed signals, for
    `raised`."""
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
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # `nohup` and a shell's `&` ignore some
    before: dict[Any, Any] = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


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
    """Run `work` on a thread. The first Ctrl-C or SIGTERM calls `ask` and waits until the work ends, as long as `somebody_works()` is true.
    A second signal is raised immediately; without `ask`, so is the first. Returns the first signal's exception (KeyboardInterrupt,
    SystemExit) or None. Raises the exception of `work`.

    On the main thread, Ray Train's `fit` would replace the handler of Ctrl-C and not restore it.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        ended.set()

    ended = Event()  # not Thread.join: after a signal interrupts it, it reports the thread as ended
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
