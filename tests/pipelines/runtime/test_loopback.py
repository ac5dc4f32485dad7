"""No process of a local Ray instance can be reached from another machine."""

import os
import socket
from pathlib import Path

import pytest
from sockets import listening, recorded
from tiny_cache import ARCHITECTURE, TOKENIZER, write_latents

from pipelines.runtime.stage import Stage
from pipelines.training.settings import TrainSettings
from pipelines.training.stage import train

RECIPE = TrainSettings(images=64, batch=16, micro_batch=4, warmup_images=32, workers=2, precision="float32", log_images=64)


def test_the_list_of_sockets_names_address_and_port() -> None:
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("::1", 0), family=socket.AF_INET6) as here:
        opened = {("0.0.0.0", everywhere.getsockname()[1]), ("::1", here.getsockname()[1])}
        assert opened <= {(address, port) for _, address, port in listening(os.getpid())}
    assert not opened & {(address, port) for _, address, port in listening(os.getpid())}


def test_while_a_stage_trains_on_two_workers_everything_listens_on_the_loopback(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    cache = write_latents(tmp_path / "cache")
    with recorded(os.getpid()) as found:
        train(TOKENIZER.path, cache, ARCHITECTURE, TrainSettings(**{**vars(RECIPE), "path": str(tmp_path / "train")}), stage)
    assert not {one for one in found if one[1] not in ("127.0.0.1", "::1")}
    processes = {name for name, *_ in found}
    for name in ("gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::TrainController", "ray::RayTrainWorker"):
        assert any(one.startswith(name) for one in processes), (name, processes)
    workers = {port for name, _, port in found if name.startswith("ray::RayTrainWorker")}
    assert len(workers) >= 2 * 2 + 1  # each worker's own port and gloo's, and the port of the key-value store
