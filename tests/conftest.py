"""Fixtures every room's tests share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from preforked import preforked

from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import Stage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the modules that share a local Ray instance last, so that the others run before it starts."""
    shared = {item.path for item in items if _shares_ray(item)}
    items.sort(key=lambda item: item.path in shared)


def _shares_ray(item: pytest.Item) -> bool:
    """Whether a test uses this file's `ray_local`, rather than one that its own module defines."""
    found = item.session._fixturemanager.getfixturedefs("ray_local", item) if "ray_local" in getattr(item, "fixturenames", ()) else None
    return bool(found) and found[-1].scope == "session"


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSettings]:
    """A real local Ray instance with two CPUs, shared by all modules that need nothing special of it."""
    settings = ClusterSettings(address="", cpus=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_worker_niceness", "0")  # at Ray's 15 its workers would wait for whatever else the suite runs
        folder = Path(tmp_path_factory.mktemp("ray"))
        with preforked(folder / "workers") as end, connected(settings, folder / "ray.log"):
            yield settings
            end()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a process that a shell started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stage(ray_local: ClusterSettings) -> Stage:
    """An untracked stage on the shared local Ray instance."""
    return Stage("test", ray_local)
