"""What a killed driver leaves behind: processes of its local Ray instance that do not end, or end only minutes later."""

import os
import re
from contextlib import suppress
from pathlib import Path

import psutil

DRIVER = "MAR_RAY_DRIVER"  # in the environment of the processes of a local Ray instance: its driver, as `identity_of` names it
MARK = "mar_driver"  # a file in the instance's session directory that says the same


def identity_of(process: int) -> str:
    """A process by its number and the moment of its start, since numbers are used again: "PID-TICKS", in clock ticks after the boot.

    Raises OSError if there is no such process.
    """
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return f"{process}-{after_name[19]}"


def mark(session: str) -> None:
    """Write into the session directory of this process's local Ray instance whose it is."""
    Path(session, MARK).write_text(identity_of(os.getpid()))


def end_orphans() -> None:
    """End the processes of local Ray instances whose driver is dead, wherever they are in the tree of processes by now. Processes of
    other PID namespaces (containers) are left alone: their drivers' numbers mean nothing here."""
    here = os.readlink("/proc/self/ns/pid")
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            driver = _driver_of(process)
            if driver and not _is_alive(driver) and os.readlink(f"/proc/{process.pid}/ns/pid") == here:
                process.kill()


def _driver_of(process: psutil.Process) -> str | None:
    """The driver of the local Ray instance that this process belongs to. A process that names itself, as Ray's do, writes its name over
    its environment, and zeros over some kilobytes more; those that may have lost the mark there write to logs of their session."""
    environ = Path(f"/proc/{process.pid}/environ").read_bytes()  # psutil reads none where a process has named itself
    found = re.search(rf"(?:^|\0){DRIVER}=(\d+-\d+)\0".encode(), environ)
    if found:
        return found[1].decode()
    if process.name().startswith("ray::"):
        for file in Path(f"/proc/{process.pid}/fd").iterdir():
            session = re.match(r"(.*/session_[^/]+)/logs/", os.readlink(file))
            if session:
                return Path(session[1], MARK).read_text()
    return None


def _is_alive(identity: str) -> bool:
    try:
        return identity_of(int(identity.partition("-")[0])) == identity
    except OSError:
        return False
