"""Ray Train's trainer as stages use it: its workers, how they find each other, and only the callbacks that are needed."""

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
    """Ray Train's workers (their number, or the fewest and the most), each with one CPU and `gpus` GPUs."""
    each = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    return ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=each)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Without the callback that hands out Ray Datasets, which our workers don't read: it costs an actor in every start of a group and a
    call to each worker. Where there is no dashboard, also without the actor that would ask it whether the controller is lost, to free its
    resources."""

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback,) if get_webui_url_from_internal_kv() else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, idle)]


class ProcessGroupConfig(TorchConfig):  # type: ignore[misc]
    """If the first worker's address is 127.0.0.1, its key-value store listens there alone. PyTorch's own listens on all interfaces, and
    whoever connects may write to it."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_replace_store)
        super().on_start(worker_group, backend_config)


def _replace_store() -> None:
    """In a worker, before it joins the process group."""
    distributed, rendezvous = (import_module(f"torch.distributed{module}") for module in ("", ".rendezvous"))

    def store(host_name: str, port: int, world_size: int | None = None, is_master: bool = False, **options: Any) -> Any:
        if is_master and host_name == loopback.ADDRESS:
            options["master_listen_fd"] = socket.create_server((host_name, port)).detach()
        return distributed.TCPStore(host_name, port, world_size, is_master, **options)

    rendezvous.TCPStore = store  # type: ignore[attr-defined]
