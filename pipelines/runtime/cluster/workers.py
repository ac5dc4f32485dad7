"""Resources of a Ray worker: CPUs and GPUs, threads, device, memory."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipelines.runtime.cluster.host_memory import keep_freed_memory
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError

if TYPE_CHECKING:
    import torch


def set_up_ray_data() -> None:
    """Configure Ray Data in this process: no progress bars, and exceptions of workers are raised unchanged."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Ray's wrapper loses the cause when it is sent from a worker


def cluster_resources() -> tuple[float, float]:
    """CPUs and GPUs of the connected cluster."""
    import ray

    total = ray.cluster_resources()
    return total.get("CPU", 0.0), total.get("GPU", 0.0)


def worker_resources(cluster: ClusterSettings) -> dict[str, float]:
    """Ray resources of one actor that holds a model."""
    return {"num_cpus": 1, "num_gpus": cluster.gpus_per_worker}


def require_workers(wanted: Mapping[str, int], cluster: ClusterSettings, cpus_each: int = 1) -> None:
    """Raise UserError when the cluster cannot run these workers (setting → number of workers) at the same time: they would wait forever."""
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
            "set cluster.autoscaling=true if it scales up on demand",
        )


def use_threads(cluster: ClusterSettings) -> None:
    """In a worker, fix the number of torch threads, so that sums have the same order on every machine; without a GPU, also reuse freed
    memory (`keep_freed_memory`)."""
    import torch

    if not cluster.gpus_per_worker:
        keep_freed_memory()
    torch.set_num_threads(cluster.threads)


def default_device() -> "torch.device":
    """The GPU that Ray assigned to this worker, else the CPU (also on a machine with GPUs if the worker requested none)."""
    import ray
    import torch

    assigned = ray.is_initialized() and ray.get_runtime_context().get_accelerator_ids().get("GPU")
    return torch.device("cuda", torch.cuda.current_device()) if assigned and torch.cuda.is_available() else torch.device("cpu")
