"""Imports what Ray's workers import, then forks one for each connection to the Unix socket whose path is given; ends when stdin does.

A worker lives as long as its launcher, which is the process that the raylet ends, and the launcher as long as its worker.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from types import SimpleNamespace
from typing import Any

WITHOUT_RAY = ("pandas", "pyarrow.parquet", "torch.distributed", "mar_model")
WITH_RAY = (
    "ray.data", "ray.train.torch", "ray.tune", "pipelines.sweeping.stage", "pipelines.tokenizing.worker", "pipelines.training.worker",
)  # fmt: skip


def asked(connection: socket.socket) -> dict[str, Any]:
    """What the launcher sends: the worker's arguments, environment and working directory, and its files for stdout and stderr."""
    _, files, _, _ = socket.recv_fds(connection, 1, 2)
    with connection.makefile("rb") as stream:
        wanted: dict[str, Any] = json.loads(stream.readline())
    return wanted | {"files": files}


def become(wanted: dict[str, Any]) -> None:
    """In the child: run as the worker."""
    from ray._raylet import Config

    os.setpgid(0, 0)  # the raylet ends a worker's process group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in zip((null, *wanted["files"]), (0, 1, 2), strict=True):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    Config.initialize("")  # from this environment
    os.chdir(wanted["folder"])
    program, *arguments = wanted["arguments"]
    sys.argv[:] = [program, *arguments]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


def load(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes one thread along"
    gc.collect()
    gc.freeze()  # the collector of a child does not write to what they share


def load_with_ray() -> None:
    """Import what imports Ray, without a draw from its random generator: after one, all children would draw the same IDs of tasks."""
    from ray import ObjectRef, actor

    of_ray = actor.ActorClassID  # which draws one for each class of actors that a module defines
    actor.ActorClassID = SimpleNamespace(from_random=lambda: of_ray(os.urandom(of_ray.size())))
    load(WITH_RAY)
    actor.ActorClassID = of_ray
    drawn = set[bytes]()
    for _ in range(2):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, ObjectRef.from_random().binary())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as stream:
            drawn.add(stream.read())
        os.waitpid(pid, 0)
    assert len(drawn) == 2, "Ray's random generator was used while modules were imported"


class Workers:
    """The forked workers and the connections of their launchers. A file descriptor of each can be waited on."""

    def __init__(self) -> None:
        self._launchers = dict[int, socket.socket]()  # by the descriptor of the worker's process
        self._pids = dict[int, int]()

    def add(self, pid: int, launcher: socket.socket) -> None:
        ended = os.pidfd_open(pid)
        self._launchers[ended], self._pids[ended] = launcher, pid

    def descriptors(self) -> list[int]:
        """Readable once a worker or a launcher has ended."""
        return [one for ended, launcher in self._launchers.items() for one in (ended, launcher.fileno())]

    def heed(self, readable: set[int]) -> None:
        """End the workers whose launchers have ended, and the launchers whose workers have."""
        for ended, launcher in list(self._launchers.items()):
            if launcher.fileno() in readable:
                os.kill(self._pids[ended], signal.SIGKILL)
            if ended in readable or launcher.fileno() in readable:
                os.waitpid(self._pids.pop(ended), 0)
                os.close(ended)
                self._launchers.pop(ended).close()

    def close(self) -> None:
        """In a forked child."""
        for ended, launcher in self._launchers.items():
            os.close(ended)
            launcher.close()


def end_with_parent() -> None:
    """This process gets SIGKILL when the one that forked it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    workers = Workers()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen(64)
        load(WITHOUT_RAY)
        while True:
            found, _, _ = select.select([server, sys.stdin, *workers.descriptors()], [], [])
            if sys.stdin in found:
                return
            workers.heed({one for one in found if isinstance(one, int)})
            if server not in found:
                continue
            connection, _ = server.accept()
            wanted = asked(connection)
            if "ray" not in sys.modules:  # reads once and for all from the environment what all workers of a driver have in common
                os.environ.update(wanted["environment"])
                load_with_ray()
            pid = os.fork()
            if pid == 0:
                end_with_parent()
                workers.close()
                connection.close()
                server.close()
                become(wanted)
                return
            workers.add(pid, connection)
            for file in wanted["files"]:
                os.close(file)


main()
