"""The Ray cluster a stage runs on: joined by address, or started for this process alone and stopped again."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.runtime.cluster import loopback
from pipelines.runtime.cluster.host_memory import ENVIRONMENT, keep_freed_memory
from pipelines.runtime.cluster.interruption import held_back, raised
from pipelines.runtime.cluster.orphans import DRIVER, end_orphans, identity_of, mark
from pipelines.runtime.errors import UserError
from pipelines.runtime.progress import output_in
from pipelines.runtime.settings import operational

if TYPE_CHECKING:
    import torch

START_ATTEMPTS = 5  # a run killed a moment ago leaves agents that hold their ports for some seconds
STOP_SECONDS = 15.0
CONNECT_SECONDS = 10.0
OWN = {  # of a Ray of our own: the environment variables that spare work that nobody has a use for, and keep others out
    "RAY_task_events_report_interval_ms": "0",  # what only a dashboard would show
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # of its one node no notice is given
    **loopback.ENVIRONMENT,
}


@dataclass
class ClusterSettings:
    """Section `cluster`."""

    address: str = operational("", "Ray address (host:port, ray://…, auto); empty: RAY_ADDRESS, else a Ray of its own")
    cpus: int = operational(0, "CPUs of a Ray of its own; 0: this machine's")
    autoscaling: bool = operational(False, "the cluster grows when asked: wait for workers that it does not hold yet")
    threads: int = operational(1, "torch threads of a worker without GPU")
    gpus_per_worker: float = operational(0.0, "GPUs each training, encoding and generating worker takes")


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
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """These environment variables for the body; those that the person has set stay as they are."""
    ours = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _signals_left_to_us() -> Iterator[None]:
    """`ray.init` in the body puts no handler of its own in the place of ours: it would exit with status 15 from wherever it is."""
    from ray._private import utils

    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def _join(address: str) -> None:
    if _has_token():  # Ray looks for a token of its own accord only when it starts a cluster
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    _check_listening(address)
    import ray

    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # a submitted job brings the project as its working directory
    project = Path(__file__).resolve().parent.parent
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
            "(`ray status --address …` shows one); leave it empty to use a Ray of this machine's own"
        ) from error


def _has_token() -> bool:
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or (Path.home() / ".ray" / "auth_token").is_file()


def _check_listening(address: str) -> None:
    """Raise UserError when nothing listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto", and whatever else Ray resolves itself
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"cluster.address {address!r} doesn't answer ({error.strerror or error}); expected a running Ray head: start one with "
            "`ray start --head`, or leave cluster.address and RAY_ADDRESS empty to use a Ray of this machine's own"
        ) from error


def _start(cluster: ClusterSettings) -> None:
    import ray

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
            node = ray._private.worker._global_node
            mark(node.get_session_dir_path())
            for idle in (node.kill_log_monitor, node.kill_monitor, node.kill_dashboard):  # no logs here, no nodes to add, no pages
                idle(check_alive=False)
            return
        except Exception as error:
            logging.getLogger("ray").exception("Ray did not start (attempt %d of %d)", attempt + 1, START_ATTEMPTS)
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise UserError(f"a Ray of this machine's own did not start: {error}") from error
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


def set_up_ray_data() -> None:
    """In a process that is to run Ray Data: it draws nothing, and what a worker raises arrives as it is."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # what Ray wraps it in loses the cause on its way from a worker


def cluster_resources() -> tuple[float, float]:
    """CPUs and GPUs of the connected cluster."""
    import ray

    total = ray.cluster_resources()
    return total.get("CPU", 0.0), total.get("GPU", 0.0)


def worker_resources(cluster: ClusterSettings) -> dict[str, float]:
    """What one actor that holds a model takes."""
    return {"num_cpus": 1, "num_gpus": cluster.gpus_per_worker}


def require_workers(wanted: Mapping[str, int], cluster: ClusterSettings, cpus_each: int = 1) -> None:
    """Raise UserError when the cluster can't hold these workers (setting → their number) at once: they would wait for ever."""
    if cluster.autoscaling:
        return
    cpus, gpus = cluster_resources()
    workers = sum(wanted.values())
    if workers * cpus_each > cpus or workers * cluster.gpus_per_worker > gpus:
        described = " and ".join(f"{key} {number}" for key, number in wanted.items())
        raise UserError(
            f"{described}: {workers} workers, each with {cpus_each} CPU and {cluster.gpus_per_worker:g} GPU (cluster.gpus_per_worker), but "
            f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs; lower {' or '.join(wanted)}, join a larger cluster with cluster.address, or "
            "set cluster.autoscaling=true where it grows when asked"
        )


def use_threads(cluster: ClusterSettings) -> None:
    """Inside a worker: fix the number of torch threads, so that sums are made in the same order everywhere; without a GPU, keep freed
    memory."""
    import torch

    if not cluster.gpus_per_worker:
        keep_freed_memory()
    torch.set_num_threads(cluster.threads)


def default_device() -> "torch.device":
    """The GPU this worker was given, else the CPU (also on a machine with GPUs, when none was asked for)."""
    import ray
    import torch

    given = ray.is_initialized() and ray.get_runtime_context().get_accelerator_ids().get("GPU")
    return torch.device("cuda", torch.cuda.current_device()) if given and torch.cuda.is_available() else torch.device("cpu")
