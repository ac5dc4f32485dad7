"""Fixtures every room's tests share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import Stage


@pytest.fixture(scope="module")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSettings]:
    """A real Ray of this module's own, with two CPUs."""
    settings = ClusterSettings(address="", cpus=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(settings, Path(tmp_path_factory.mktemp("ray")) / "ray.log"):
            yield settings


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a process that a shell started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stage(ray_local: ClusterSettings) -> Stage:
    """An untracked stage on the module's Ray."""
    return Stage("test", ray_local)
