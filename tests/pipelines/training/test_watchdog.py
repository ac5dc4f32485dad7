"""A worker that makes no step any more is ended, and what it did is told; one that does is left alone."""

import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
from pipelines.runtime.supervision.watchdog import Watchdog

def stuck():
    time.sleep(60)

with Watchdog("worker 1", 0.4, lambda text: print(text, flush=True)) as watchdog:
    for _ in range(8):
        watchdog.stepped()
        time.sleep(0.1)
    print("eight steps", flush=True)
    stuck()
"""


def test_it_is_ended_and_told_where_it_was(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    done = subprocess.run([sys.executable, script], cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    first, told = done.stdout.splitlines()
    assert first == "eight steps"
    assert told == "worker 1 hangs: no step for 0 s, in stuck (script.py:6); killing it"
