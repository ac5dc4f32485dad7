"""Ray's private names exist and take what they are given. Where this fails after an upgrade of Ray, the code that uses the name has to be
read again; no run fails first, in the middle."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train.torch import TorchTrainer

from pipelines.runtime.cluster import ray_internals

TAKEN: dict[str, tuple[Callable[[], Any], list[str]]] = {  # name → parameters
    "set_sigterm_handler": (lambda: ray_internals.utils.set_sigterm_handler, ["sigterm_handler"]),
    "kill_log_monitor": (lambda: _node().kill_log_monitor, ["self", "check_alive"]),
    "kill_monitor": (lambda: _node().kill_monitor, ["self", "check_alive"]),
    "kill_dashboard": (lambda: _node().kill_dashboard, ["self", "check_alive"]),
    "get_session_dir_path": (lambda: _node().get_session_dir_path, ["self"]),
    "get_webui_url_from_internal_kv": (lambda: ray_internals.get_webui_url_from_internal_kv, []),
    "_create_default_callbacks": (lambda: TorchTrainer._create_default_callbacks, ["self"]),
    "on_start": (lambda: ray_internals._TorchBackend.on_start, ["self", "worker_group", "backend_config"]),
    "WorkerGroupStartupTimeoutError": (lambda: ray_internals.WorkerGroupStartupTimeoutError.__init__, ["self", "num_workers"]),
    "WorkerHealthCheckFailedError": (lambda: ray_internals.WorkerHealthCheckFailedError.__init__, ["self", "message", "failure"]),
    **{
        name: (lambda name=name: getattr(ray_internals.ControllerCallback, name), ["self", *taken])
        for name, taken in {
            "after_controller_start": ["train_run_context"],
            "after_controller_state_update": ["previous_state", "current_state"],
            "before_controller_execute_resize_decision": ["resize_decision"],
        }.items()
    },
    **{
        name: (lambda name=name: getattr(ray_internals.WorkerGroupCallback, name), ["self", *taken])
        for name, taken in {
            "before_worker_group_start": ["worker_group_context"],
            "after_worker_group_training_start": ["worker_group"],
            "after_worker_group_poll_status": ["worker_group_status"],
        }.items()
    },
    **{
        name: (lambda name=name: getattr(ray_internals.WorkerGroup, name), ["self", *taken])
        for name, taken in {
            "_start": [],
            "has_started": [],
            "_clear_state": [],
            "_create_placement_group": ["scaling_config", "worker_group_context"],
            "_create_workers": [
                "num_workers", "placement_group", "resources_per_worker", "placement_group_bundle_indices", "starting_world_rank",
                "world_size", "replica_group_size",
            ],
        }.items()
    },
}  # fmt: skip


def _node() -> Any:
    from ray._private.node import Node  # the type of ray._private.worker._global_node

    return Node


@pytest.mark.parametrize("name", ray_internals.PRIVATE)
def test_ray_has_it(name: str) -> None:
    why = ray_internals.PRIVATE[name][1]
    assert getattr(ray_internals, name, None) is not None, f"Ray {ray.__version__} has no {name} any more, used because {why}"


@pytest.mark.parametrize("name", TAKEN)
def test_it_takes_what_it_is_given(name: str) -> None:
    find, taken = TAKEN[name]
    found = list(inspect.signature(find()).parameters)
    assert found == taken, f"{name} of Ray {ray.__version__} takes {found}, the code that uses it gives {taken}"


def test_attributes_that_are_set_exist() -> None:
    assert isinstance(ray_internals.ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert ray_internals.TrainController.worker_group_cls is ray_internals.WorkerGroup
    assert hasattr(ray_internals.worker, "_global_node")


def test_no_other_file_uses_private_names_of_ray() -> None:
    project = Path(__file__).parents[3]
    private = re.compile(r"^\s*(from|import) ray[\w.]*\._|\bray\._private\b|\bray\.[\w.]*\._internal\b", re.M)
    found = [str(path) for room in ("pipelines", "jobs") for path in (project / room).rglob("*.py") if private.search(path.read_text())]
    assert found == [str(project / "pipelines/runtime/cluster/ray_internals.py")]
