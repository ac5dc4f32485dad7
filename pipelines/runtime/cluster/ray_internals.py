"""Every private name of Ray that this project uses, and why no public one serves.

    from pipelines.runtime.cluster.ray_internals import WorkerGroup

imports the name from Ray when it is asked for. `tests/pipelines/runtime/test_ray_internals.py` asserts that each exists and takes what it
is given, so that an upgrade of Ray fails there.
"""

from importlib import import_module
from typing import Any

PRIVATE = {  # name → (module, why)
    "utils": ("ray._private.utils", "`ray.init` replaces the SIGTERM handler, and has no option not to"),
    "worker": ("ray._private.worker", "the local instance's node: its session directory, and helper processes that no option switches off"),
    "ray_constants": ("ray._private.ray_constants", "whether a local instance binds to 127.0.0.1 is read from an internal variable"),
    "get_webui_url_from_internal_kv": ("ray._private.services", "the only way to ask a cluster whether it has a dashboard"),
    "DatasetsCallback": ("ray.train.v2._internal.callbacks", "default callbacks can be left out by class alone"),
    "PlacementGroupCleanerCallback": (
        "ray.train.v2._internal.callbacks.placement_group_callback", "default callbacks can be left out by class alone",
    ),
    "ControllerCallback": ("ray.train.v2._internal.execution.callback", "resize decisions and state changes have no public callback"),
    "WorkerGroupCallback": ("ray.train.v2._internal.execution.callback", "starts and polls of a group have no public callback"),
    "TrainController": ("ray.train.v2._internal.execution.controller", "the class of worker groups is an attribute of the controller"),
    "WorkerGroup": ("ray.train.v2._internal.execution.worker_group", "its start waits without limit for a worker that hangs"),
    "WorkerGroupStartupFailedError": ("ray.train.v2._internal.exceptions", "public errors do not tell a failed start from a failed run"),
    "WorkerGroupStartupTimeoutError": ("ray.train.v2._internal.exceptions", "public errors do not tell missing room from a failed start"),
    "WorkerHealthCheckFailedError": ("ray.train.v2._internal.exceptions", "public errors do not tell a lost worker from one that raised"),
    "WorkerHealthCheckTimeoutError": ("ray.train.v2._internal.exceptions", "public errors do not tell a hung worker from one that raised"),
    "_TorchBackend": ("ray.train.torch.config", "the process group's store listens on all interfaces, and has no option not to"),
}  # fmt: skip
MODULES = ("utils", "worker", "ray_constants")  # names above that are modules themselves


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f"{__name__} has no name {name!r}")
    module = import_module(PRIVATE[name][0])
    return module if name in MODULES else getattr(module, name)
