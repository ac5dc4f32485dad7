"""The Ray cluster a stage runs on: joined by address, or started for this process alone and stopped again."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.runtime.cluster import loopback
from pipelines.runtime.cluster.host_memory import ENVIRONMENT
from pipelines.runtime.cluster.interruption import held_back, raised
from pipelines.runtime.cluster.orphans import DRIVER, end_orphans, identity_of, mark
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import set_up_ray_data
from pipelines.runtime.environment import environment
from pipelines.runtime.errors import UserError
from pipelines.runtime.progress import output_in

START_ATTEMPTS = 5  # a run killed a moment ago leaves agents that hold their ports for some seconds
STOP_SECONDS = 15.0
CONNECT_SECONDS = 10.0
OWN = {  # of a Ray of our own: the environment variables that spare work that nobody has a use for, and keep others out
    "RAY_task_events_report_interval_ms": "0",  # what only a dashboard would show
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # of its one node no notice is given
    **loopback.ENVIRONMENT,
}


@contextmanager
def connected(cluster: ClusterSettings, log: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Ray for the body: the one this process already uses, the one at `cluster.address` or RAY_ADDRESS, or one of its own.

    A Ray of its own listens for this process alone and is stopped at the end, also on Ctrl-C, SIGTERM and errors; a joined one
    is only left. Ray's chatter goes to the file `log`, which `say` names. Raises UserError when the address does not answer.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    say(f"Ray's own messages go to {log}")
    with held_back() as waiting, output_in(log), environment({} if address else OWN):
        _send_chatter_to(log)
        try:
            with _signals_left_to_us():
                if address:
                    _join(address)
                else:
                    _start(cluster)
            with raised(waiting):
                yield
        finally:
            _leave(own=not address)


@contextmanager
def _signals_left_to_us() -> Iterator[None]:
    """`ray.init` in the body puts no handler of its own in the place of ours: it would exit with status 15 from wherever it is."""
    from pipelines.runtime.cluster.ray_internals import utils

    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def _join(address: str) -> None:
    if auth_token():  # Ray looks for a token of its own accord only when it starts a cluster
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    _check_listening(address)
    import ray

    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # a submitted job brings the project as its working directory
    project = Path(__file__).resolve().parents[3]
    modules = [str(project / package) for package in ("pipelines", "mar_model")]
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            runtime_env=None if inside_job else {"py_modules": modules, "env_vars": ENVIRONMENT},
        )
    except Exception as error:
        raise UserError(
            f"cluster.address {address!r} can't be joined: {str(error).splitlines()[0]}; expected a running Ray head "
            "(`ray status --address …` shows one)",
            remedy="leave it empty to use a local Ray instance",
        ) from error


def _check_listening(address: str) -> None:
    """Raise UserError when nothing listens at host:port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto", and whatever else Ray resolves itself
        return
    if reason := unreachable(host, int(port)):
        raise UserError(
            f"cluster.address {address!r} doesn't answer ({reason}), expected a running Ray head",
            remedy="start one with `ray start --head`, or leave cluster.address and RAY_ADDRESS empty to use a local Ray instance",
        )


def unreachable(host: str, port: int) -> str:
    """Why nothing listens at host:port, empty where something does. Ray itself would try for minutes."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def auth_token() -> str:
    """The token in the places where Ray looks, in its order; empty if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() if file.is_file() else ""


def _start(cluster: ClusterSettings) -> None:
    import ray

    from pipelines.runtime.cluster.ray_internals import worker

    end_orphans()
    os.environ |= ENVIRONMENT
    for attempt in range(START_ATTEMPTS):
        try:
            with environment({DRIVER: identity_of(os.getpid())}), loopback.address_of_this_node():
                ray.init(
                    address="local",
                    num_cpus=cluster.cpus or None,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                )
            node = worker._global_node
            mark(node.get_session_dir_path())
            for idle in (node.kill_log_monitor, node.kill_monitor, node.kill_dashboard):  # no logs here, no nodes to add, no pages
                idle(check_alive=False)
            return
        except Exception as error:
            logging.getLogger("ray").exception("Ray did not start (attempt %d of %d)", attempt + 1, START_ATTEMPTS)
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise UserError(f"a local Ray instance did not start: {error}") from error
            time.sleep(2.0 * (attempt + 1))


def _leave(own: bool) -> None:
    """Disconnect; of a Ray of our own, wait until its processes are gone, and end those that stay."""
    import psutil
    import ray

    started = psutil.Process().children(recursive=True) if own else []
    ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=STOP_SECONDS)
    ray_processes = [one for one in alive if _belongs_to_ray(one)]
    for process in ray_processes:
        process.kill()
    psutil.wait_procs(ray_processes, timeout=STOP_SECONDS)


def _belongs_to_ray(process: Any) -> bool:
    import psutil

    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return "ray" in command


def _send_chatter_to(log: Path) -> None:
    """Ray's loggers write to `log` and no longer to the terminal."""
    import ray.data
    import ray.train  # noqa: F401  # so that their loggers are there

    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        if name.split(".")[0] == "ray":
            logger.handlers = [one for one in logger.handlers if not isinstance(one, logging.StreamHandler)]
    root = logging.getLogger("ray")
    root.handlers, root.propagate = [handler], False
    set_up_ray_data()
