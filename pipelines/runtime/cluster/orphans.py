"""Orphans of a killed driver: processes of its local Ray instance that keep running, some for minutes, some for ever."""

import os
import re
from contextlib import suppress
from pathlib import Path

import psutil

DRIVER = "MAR_RAY_DRIVER"  # environment variable of a local Ray instance's processes: the driver, as returned by `identity_of`
MARK = "mar_driver"  # file in the instance's session directory with the same content


def identity_of(process: int) -> str:
    """Identify a process by its PID and start time, since PIDs are reused: "PID-TICKS", in clock ticks after boot.

    Raises OSError if there is no such process.
    """
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return f"{process}-{after_name[19]}"


def mark(session: str) -> None:
    """Record this process as the driver in the session directory of its local Ray instance."""
    Path(session, MARK).write_text(identity_of(os.getpid()))


def end_orphans() -> None:
    """Kill the processes of every local Ray instance that has lost its driver, wherever they are in the process tree. Processes in other
    PID namespaces (containers) are not touched: the PIDs of their drivers have no meaning here."""
    here = os.readlink("/proc/self/ns/pid")
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            driver = _driver_of(process)
            if driver and not _is_alive(driver) and os.readlink(f"/proc/{process.pid}/ns/pid") == here:
                process.kill()


def _driver_of(process: psutil.Process) -> str | None:
    """The driver of the local Ray instance that this process belongs to; None if it belongs to none.

    Ray's processes set their own title, which overwrites part of their environment. If the environment has lost `DRIVER`, the session
    directory is found through the process's open log files.
    """
    environ = Path(f"/proc/{process.pid}/environ").read_bytes()  # psutil reads nothing from a process that has set its title
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
