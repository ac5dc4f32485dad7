"""Ctrl-C and SIGTERM as a command answers them: one line, and an exit status of their own."""

import os
import shlex
import signal
import sys
from types import FrameType

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def last_line(number: int) -> str:
    """What a command prints when it ends by this signal: the command that goes on."""
    return f"mar: {WORDS[signal.Signals(number)]}; to go on: {shlex.join(['mar', *sys.argv[1:]])}"


def leave_at_once() -> None:
    """From now on these signals end the process immediately. For as long as it has nothing to stop: not even an import is in their way."""
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(sys.stderr.fileno(), f"{last_line(number)}\n".encode())
    os._exit(128 + number)
