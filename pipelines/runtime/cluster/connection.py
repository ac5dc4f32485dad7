"""The Ray cluster that a stage runs on: an existing cluster, joined by its address, or a local Ray instance for this process alone."""

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

START_ATTEMPTS = 5  # the agents of a run that was just killed hold their ports for some seconds
STOP_SECONDS = 15.0
CONNECT_SECONDS = 10.0
LOCAL_ENVIRONMENT = {  # environment variables of a local Ray instance: no unused background work, no access from other machines
    "RAY_task_events_report_interval_ms": "0",  # used by the dashboard alone
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a single local node receives no preemption notice
    **loopback.ENVIRONMENT,
}


@contextmanager
def connected(cluster: ClusterSettings, log: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Connect to Ray for the body: the instance this process already uses, the cluster at `cluster.address` or RAY_ADDRESS, or a new local
    Ray instance.

    A local Ray instance accepts connections from this machine alone and is stopped at the end, also on Ctrl-C, SIGTERM and errors; a
    joined cluster keeps running. Ray's log messages go to the file `log`; `say` prints its path. Raises UserError when the address does
    not answer.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    say(f"Ray's own messages go to {log}")
    with held_back() as waiting, output_in(log), environment({} if address else LOCAL_ENVIRONMENT):
        _redirect_ray_logs(log)
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
    """Prevent `ray.init` in the body from replacing our SIGTERM handler: Ray's handler exits with status 15 at any point."""
    from pipelines.runtime.cluster.ray_internals import utils

    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def _join(address: str) -> None:
    if auth_token():  # by default Ray looks for a token only when it starts a cluster
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    _check_listening(address)
    import ray

    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the working directory of a submitted job contains the project
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
            f"cluster.address {address!r} can't be joined: {str(error).splitlines()[0]}; expected the address of a running Ray head",
            remedy="check it with `ray status --address …`, or leave it empty to use a local Ray instance",
        ) from error


def _check_listening(address: str) -> None:
    """Raise UserError when nothing listens at host:port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto", or another form that Ray resolves
        return
    if reason := unreachable(host, int(port)):
        raise UserError(
            f"cluster.address {address!r} doesn't answer ({reason}), expected a running Ray head",
            remedy="start one with `ray start --head`, or leave cluster.address and RAY_ADDRESS empty to use a local Ray instance",
        )


def unreachable(host: str, port: int) -> str:
    """Why a connection to host:port fails; empty if it succeeds. Ray itself would retry for minutes."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def auth_token() -> str:
    """The token, from the same sources and in the same order as Ray reads it; empty if none is set."""
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
            for kill in (node.kill_log_monitor, node.kill_monitor, node.kill_dashboard):  # a local instance uses none of these
                kill(check_alive=False)
            return
        except Exception as error:
            logging.getLogger("ray").exception("Ray did not start (attempt %d of %d)", attempt + 1, START_ATTEMPTS)
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise UserError(f"a local Ray instance did not start: {error}") from error
            time.sleep(2.0 * (attempt + 1))


def _leave(own: bool) -> None:
    """Disconnect. For a local Ray instance (`own`), also wait until its processes have exited, and kill the rest."""
    import psutil
    import ray

    started = psutil.Process().children(recursive=True) if own else []
    ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=STOP_SECONDS)
    ray_processes = [process for process in alive if _belongs_to_ray(process)]
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


def _redirect_ray_logs(log: Path) -> None:
    """Make Ray's loggers write to `log` instead of the terminal."""
    import ray.data
    import ray.train  # noqa: F401  # creates their loggers

    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        if name.split(".")[0] == "ray":
            logger.handlers = [old for old in logger.handlers if not isinstance(old, logging.StreamHandler)]
    root = logging.getLogger("ray")
    root.handlers, root.propagate = [handler], False
    set_up_ray_data()
