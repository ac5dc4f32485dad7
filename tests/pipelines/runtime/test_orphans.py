"""What a killed driver leaves behind is ended at the next start; what has a living driver, or none of ours, is not."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.runtime.cluster.orphans import DRIVER, MARK, end_orphans, identity_of

BECOME_PARENT_OF_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER in linux/prctl.h
STARTED = """
import os, sys, time
from pathlib import Path
from pipelines.runtime.cluster.connection import ClusterSettings, connected
with connected(ClusterSettings(cpus=1), Path(sys.argv[1]) / "ray.log"):
    (Path(sys.argv[1]) / "started").touch()
    time.sleep(600)
"""


@pytest.fixture
def parent_of_orphans() -> Iterator[None]:
    """This process gets the orphans in the place of process 1, as does a desktop's session manager or a container's init."""
    control = ctypes.CDLL(None).prctl
    assert control(BECOME_PARENT_OF_ORPHANS, 1, 0, 0, 0) == 0
    yield
    control(BECOME_PARENT_OF_ORPHANS, 0, 0, 0, 0)


@pytest.mark.usefixtures("parent_of_orphans")
def test_all_processes_of_a_driver_that_was_killed_are_ended(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen([sys.executable, "-c", STARTED, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(driver.pid).children(recursive=True)
    agents = [one for one in started if "Agent" in one.name()]
    assert {one.name() for one in agents} == {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    end_orphans()
    assert all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started if one.name() in ("raylet", "gcs_server"))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    while any(one.is_running() and one.ppid() != os.getpid() for one in agents):  # their parent, the raylet, ends first
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [one for one in agents if one.status() != psutil.STATUS_ZOMBIE], "they end by themselves: nothing is left to test"
    end_orphans()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_a_process_that_has_overwritten_its_environment_is_known_by_the_logs_that_it_writes(tmp_path: Path) -> None:
    number, _, start = identity_of(os.getpid()).partition("-")
    processes = {}
    for session, identity in (("session_dead", f"{number}-{int(start) - 1}"), ("session_living", f"{number}-{start}")):
        (tmp_path / session / "logs").mkdir(parents=True)
        (tmp_path / session / MARK).write_text(identity)
        for name in ("ray::Agent", "reader"):  # somebody may read the logs
            program = tmp_path / name
            if not program.exists():
                program.symlink_to(shutil.which("sleep") or "sleep")
            with (tmp_path / session / "logs" / "agent.out").open("a") as log:
                processes[session, name] = subprocess.Popen([program, "60"], env={}, stdout=log)
    try:
        end_orphans()
        assert processes.pop(("session_dead", "ray::Agent")).wait(timeout=10) == -signal.SIGKILL
        assert [process.poll() for process in processes.values()] == [None] * 3
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_a_driver_is_known_by_its_start_too_since_process_numbers_are_used_again() -> None:
    own = identity_of(os.getpid())
    number, _, start = own.partition("-")
    marks = {"living": own, "number used again": f"{number}-{int(start) - 1}", "of an older version": number}
    processes = {name: subprocess.Popen(["sleep", "60"], env={DRIVER: mark}) for name, mark in marks.items()}
    try:
        end_orphans()
        assert processes["number used again"].wait(timeout=10) == -signal.SIGKILL
        assert processes["living"].poll() is None
        assert processes["of an older version"].poll() is None
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
