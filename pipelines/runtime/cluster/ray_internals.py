"""All private names of Ray that this project uses, and why no public API suffices.

    from pipelines.runtime.cluster.ray_internals import WorkerGroup

imports the name from Ray on access. `tests/pipelines/runtime/test_ray_internals.py` checks that each name exists and accepts the arguments
used here, so that an incompatible Ray release fails in that test.
"""

from importlib import import_module
from typing import Any

PRIVATE = {  # name → (module, why)
    "utils": ("ray._private.utils", "`ray.init` replaces the SIGTERM handler; no option prevents it"),
    "worker": ("ray._private.worker", "the local instance's node: its session directory, and helper processes that no option disables"),
    "ray_constants": ("ray._private.ray_constants", "an internal variable decides whether a local instance binds to 127.0.0.1"),
    "get_webui_url_from_internal_kv": ("ray._private.services", "no public API reports whether a cluster has a dashboard"),
    "DatasetsCallback": ("ray.train.v2._internal.callbacks", "default callbacks can only be removed by class"),
    "PlacementGroupCleanerCallback": (
        "ray.train.v2._internal.callbacks.placement_group_callback", "default callbacks can only be removed by class",
    ),
    "ControllerCallback": ("ray.train.v2._internal.execution.callback", "resize decisions and state changes have no public callback"),
    "WorkerGroupCallback": ("ray.train.v2._internal.execution.callback", "worker group starts and polls have no public callback"),
    "TrainController": ("ray.train.v2._internal.execution.controller", "the worker group class is an attribute of the controller"),
    "WorkerGroup": ("ray.train.v2._internal.execution.worker_group", "its start waits for a hung worker without a time limit"),
    "WorkerGroupStartupFailedError": ("ray.train.v2._internal.exceptions", "public errors do not separate failed starts from failed runs"),
    "WorkerGroupStartupTimeoutError": ("ray.train.v2._internal.exceptions", "no public error for missing resources"),
    "WorkerHealthCheckFailedError": ("ray.train.v2._internal.exceptions", "no public error for a dead worker"),
    "WorkerHealthCheckTimeoutError": ("ray.train.v2._internal.exceptions", "no public error for a hung worker"),
    "_TorchBackend": ("ray.train.torch.config", "the process group's store listens on all interfaces; no option prevents it"),
}  # fmt: skip
MODULES = ("utils", "worker", "ray_constants")  # names above that are modules


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f"{__name__} has no name {name!r}")
    module = import_module(PRIVATE[name][0])
    return module if name in MODULES else getattr(module, name)
