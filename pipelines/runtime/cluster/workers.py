"""What a Ray worker is given: CPUs and GPUs, threads, a device, memory."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipelines.runtime.cluster.host_memory import keep_freed_memory
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError

if TYPE_CHECKING:
    import torch


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
            f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs",
            remedy=f"lower {' or '.join(wanted)}, join a larger cluster with cluster.address, or "
            "set cluster.autoscaling=true where it grows when asked",
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
