"""Ray's worker processes, forked from a process that has imported what they need.

A Ray worker is a new Python interpreter, which takes seconds of CPU time to import Ray (twice: `setup_worker.py` does too), PyTorch, pandas
and PyArrow, and the suite starts hundreds of them. Inside `preforked()`, the raylet starts `launcher.py` in the place of
`setup_worker.py`; it hands its arguments, environment and files to the process of `server.py`, which forks the worker. From there on the
worker runs Ray's own `default_worker.py`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray._private import ray_constants

from pipelines.runtime.cluster.host_memory import ENVIRONMENT

SOCKET = "MAR_TESTS_PREFORKED"  # the environment variable with the path of the server's socket
FOLDER = Path(__file__).parent


@contextmanager
def preforked(path: Path) -> Iterator[Callable[[], None]]:
    """Fork the workers of the local Ray instance that is started in the body; `path` is that of a Unix socket to make.

    Yields what ends the server, to be called before Ray is left, which waits for all of this process's children. It ends with this
    process too. A worker that starts later takes Ray's own way.
    """
    single = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a fork takes one thread along
    server = subprocess.Popen(
        [sys.executable, str(FOLDER / "server.py"), str(path)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(FOLDER.parents[1]), **single},
        stdin=subprocess.PIPE,
    )
    assert server.stdin is not None
    while not path.exists():
        assert server.poll() is None
        time.sleep(0.01)

    def end() -> None:
        server.stdin.close()
        server.wait()

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", str(FOLDER / "launcher.py"))
            patch.setenv(SOCKET, str(path))
            yield end
    finally:
        end()
