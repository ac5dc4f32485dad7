"""What every stage is given and does alike: say how far it is, log its numbers, know its finished output again."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.cluster import ClusterSettings, connected
from pipelines.errors import UserError
from pipelines.progress import Bar, console
from pipelines.tracking import Tracker, TrackingSettings

FORMAT_VERSION = 1


class Stage:
    """One execution of one stage. `tracker` is None where nothing is tracked (inside a sweep's trial, in tests)."""

    def __init__(
        self, name: str, cluster: ClusterSettings, configuration: dict[str, Any] | None = None, tracker: Tracker | None = None
    ) -> None:
        self.name, self.cluster, self.configuration, self.tracker = name, cluster, configuration or {}, tracker
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """One line for the person."""
        console().print(f"{self.name}: {text}", markup=False, soft_wrap=True)

    def progress(self, total: int, unit: str = "images", done: int = 0) -> Bar:
        """A context manager whose `update(done, **metrics)` moves the bar."""
        return Bar(self.name, total, unit, done)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Metrics at `step` images seen, to MLflow."""
        if self.tracker is not None:
            self.tracker.log(metrics, step)

    def artifact(self, path: str) -> None:
        """A local file, to MLflow."""
        if self.tracker is not None:
            self.tracker.artifact(path)

    def begin(
        self, path: str, identity: dict[str, Any], enough: Callable[[dict[str, Any]], bool] = lambda summary: True
    ) -> dict[str, Any] | None:
        """Claim `path` for an output with this identity: None when there is work to do, the summary when all is done.

        `enough` decides whether a finished output is as long as it is wanted now. Raises UserError with the fields that differ when
        `path` holds an output of another identity.
        """
        self._began = time.monotonic()
        identity_file = storage.join(path, "identity.json")
        if storage.exists(identity_file):
            _refuse_other_identity(path, storage.read_json(identity_file), identity)
        else:
            storage.make_directory(path)
            storage.write_json(identity_file, identity)
        summary_file = storage.join(path, "summary.json")
        if not storage.exists(summary_file):
            return None
        summary: dict[str, Any] = storage.read_json(summary_file)
        if not enough(summary):
            return None
        self.say(f"{path} is complete")
        return summary

    def complete(self, path: str, identity: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
        """Write `path/summary.json`, the mark of a finished stage, last of all; returns what was written.

        Adds `format_version`, the identity and the seconds since `begin`, and logs the summary's numbers to MLflow.
        """
        seconds = round(time.monotonic() - self._began, 3)
        whole = {"format_version": FORMAT_VERSION, "stage": self.name, "seconds": seconds, **summary, "identity": identity}
        self.log({name: float(value) for name, value in whole.items() if _is_number(value)}, step=int(summary.get("images", 0)))
        storage.write_json(storage.join(path, "summary.json"), whole)
        return whole


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_other_identity(path: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = [
        f"{name} (there: {found.get(name)!r}, asked for: {expected.get(name)!r})"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differing:
        raise UserError(
            f"{path} holds an output made with another configuration; different: {'; '.join(differing)}. "
            "Give another path, set these back, or delete that directory"
        )


@contextmanager
def open_stage(
    name: str,
    path: str,
    configuration: dict[str, Any],
    cluster: ClusterSettings,
    tracking: TrackingSettings,
    parent: Tracker | None = None,
) -> Iterator[Stage]:
    """A stage with Ray connected and its MLflow run open; both are closed again, whatever happens.

    Ray's own messages go to `ray.log` in `path` (beside the working directory when `path` is on S3).
    """
    log = Path(path) / "ray.log" if storage.is_local(path) else Path(f"{name}-ray.log")
    tracker = Tracker.open(tracking, name, configuration, path, parent, say=lambda text: console().print(text, markup=False))
    status = "FAILED"
    try:
        with connected(cluster, log):
            yield Stage(name, cluster, configuration, tracker)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
