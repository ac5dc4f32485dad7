"""How the workers of a training find each other: torch.distributed as Ray Train sets it up, on one machine on the loopback alone."""

import socket
from importlib import import_module
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipelines.runtime.cluster import loopback


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
