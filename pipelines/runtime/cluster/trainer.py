"""Ray Train's TorchTrainer as stages use it: scaling, the process group, and only the necessary callbacks."""

import socket
from importlib import import_module
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.runtime.cluster import loopback
from pipelines.runtime.cluster.ray_internals import (
    DatasetsCallback,
    PlacementGroupCleanerCallback,
    _TorchBackend,
    get_webui_url_from_internal_kv,
)


def scaling(workers: int | tuple[int, int], gpus: float) -> ScalingConfig:
    """Scaling of Ray Train: the number of workers, or (minimum, maximum), each with one CPU and `gpus` GPUs."""
    each = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    return ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=each)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """TorchTrainer without unused callbacks: the one for Ray Datasets starts an actor with every worker group and calls each worker; the
    placement group cleaner polls the dashboard for a dead controller, and is removed if the cluster has no dashboard."""

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback,) if get_webui_url_from_internal_kv() else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


class ProcessGroupConfig(TorchConfig):  # type: ignore[misc]
    """If the address of rank 0 is 127.0.0.1, its key-value store listens on that address only. PyTorch's default store listens on all
    interfaces and accepts writes from any client."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_replace_store)
        super().on_start(worker_group, backend_config)


def _replace_store() -> None:
    """Runs in each worker before it joins the process group."""
    distributed, rendezvous = (import_module(f"torch.distributed{module}") for module in ("", ".rendezvous"))

    def store(host_name: str, port: int, world_size: int | None = None, is_master: bool = False, **options: Any) -> Any:
        if is_master and host_name == loopback.ADDRESS:
            options["master_listen_fd"] = socket.create_server((host_name, port)).detach()
        return distributed.TCPStore(host_name, port, world_size, is_master, **options)

    rendezvous.TCPStore = store  # type: ignore[attr-defined]
