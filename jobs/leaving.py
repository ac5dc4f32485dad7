"""How a command reacts to Ctrl-C and SIGTERM: it prints one line and exits with status 130 or 143."""

import os
import shlex
import signal
import sys
from types import FrameType

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def last_line(number: int) -> str:
    """The line that a command prints when this signal ends it: the command to resume with."""
    return f"mar: {WORDS[signal.Signals(number)]}; to resume: {shlex.join(['mar', *sys.argv[1:]])}"


def say(text: str) -> None:
    """Print a line on stderr in a single write, as `print` doesn't: the last line never ends up in the middle of it."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def leave_at_once() -> None:
    """Make both signals end the process immediately. Use it while there is nothing to clean up; not even an import delays the exit."""
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(sys.stderr.fileno(), f"{last_line(number)}\n".encode())
    os._exit(128 + number)
