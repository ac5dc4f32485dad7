"""Common parts of all stages: messages, progress, metrics, and the check whether an output is already complete."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.runtime import storage
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.interruption import held_back
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.progress import Bar, console
from pipelines.runtime.records import null_for_nan
from pipelines.runtime.tracking import RECORD, Tracker, TrackingSettings

FORMAT_VERSION = 1
IDENTITY, SUMMARY, CONFIGURATION, LOCK = "identity.json", "summary.json", "configuration.json", ".lock"
CLAIM_AGAIN = (
    "restore it from a copy; or delete it, if the stage ran with the configuration that you run it with now; or delete the whole directory"
)
BOOKKEEPING = {IDENTITY, CONFIGURATION, LOCK, RECORD, "ray.log", "error.log"}  # files that exist before a stage has produced any output


@dataclass(frozen=True)
class Summary:
    """Fields of `summary.json` that are read again; those with a default are missing in some stages."""

    format_version: int
    stage: str
    seconds: float | None = None
    identity: dict[str, Any] | None = None
    images: int | None = None
    images_seen: int | None = None


@dataclass(frozen=True)
class Configuration:
    """Sections of `configuration.json` that are read again."""

    images: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    tracking: dict[str, Any] | None = None


class Stage:
    """One execution of one stage.

    `start_tracking` opens the MLflow run as soon as there is work to do; without it nothing is tracked (in a sweep's trial, in tests).
    `configuration` is stored with the output. Every random stream of the stage is derived from `seed` and the stream's purpose.
    """

    def __init__(
        self,
        name: str,
        cluster: ClusterSettings,
        configuration: dict[str, Any] | None = None,
        start_tracking: Callable[[], Tracker] | None = None,
        seed: int = 0,
    ) -> None:
        self.name, self.cluster, self.configuration, self.seed = name, cluster, configuration or {}, seed
        self.tracker: Tracker | None = None
        self._start_tracking = start_tracking
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print one line for the user."""
        console().print(f"{self.name}: {text}", markup=False, soft_wrap=True)

    def progress(self, total: int, unit: str = "images", done: int = 0) -> Bar:
        """A context manager whose `update(done, **metrics)` moves the bar."""
        return Bar(self.name, total, unit, done)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics to MLflow; `step` is the number of images seen."""
        if self.tracker is not None:
            self.tracker.log(metrics, step)

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags of the stage's MLflow run."""
        if self.tracker is not None:
            self.tracker.tag(tags)

    def artifact(self, path: str) -> None:
        """Log a file to MLflow if it is local; files on S3 are not copied."""
        if self.tracker is not None and storage.is_local(path):
            self.tracker.artifact(path)

    def begin(
        self, path: str, identity: dict[str, Any], enough: Callable[[dict[str, Any]], bool] = lambda summary: True
    ) -> dict[str, Any] | None:
        """Claim `path` for an output with this identity. Returns None when there is work to do, the summary when the output is complete.

        `enough` decides whether a finished output has the requested length. A damaged `summary.json` is treated as missing: the stage runs
        to its end again. Raises UserError with the differing fields when `path` holds an output of another identity, and DamagedFileError
        when the identity of that output cannot be read.
        """
        self._began = time.monotonic()
        storage.make_directory(path)
        identity_file = storage.join(path, IDENTITY)
        summary = self._read_summary(path)
        if not BOOKKEEPING.issuperset(storage.list_directory(path)):
            found = self._read_identity(path, summary)
            if found is not None:
                _refuse_other_identity(path, found, identity)
        if summary is not None and enough(summary):
            self._restore(path, identity)
            self.say(f"{path} is complete")
            return summary
        if summary is None:
            storage.delete(storage.join(path, SUMMARY))  # a damaged file; other stages must not read it in the meantime
        storage.write_json(identity_file, identity)
        if self.configuration:
            storage.write_json(storage.join(path, CONFIGURATION), self.configuration)
        self.track()
        return None

    def _read_summary(self, path: str) -> dict[str, Any] | None:
        """None if the summary is missing, or damaged, which is logged."""
        if not storage.exists(storage.join(path, SUMMARY)):
            return None
        try:
            return read_summary(path, "the stage runs again and reuses its finished work")
        except DamagedFileError as error:
            self.say(str(error))
            return None

    def _read_identity(self, path: str, summary: dict[str, Any] | None) -> dict[str, Any] | None:
        """The identity of the output at `path`: from `identity.json`, else from the summary."""
        kept: dict[str, Any] | None = (summary or {}).get("identity")
        if not storage.exists(storage.join(path, IDENTITY)):
            return kept
        try:
            return read_identity(path)
        except DamagedFileError:
            if kept is None:
                raise
            return kept

    def _restore(self, path: str, identity: dict[str, Any]) -> None:
        """Write the damaged or missing records of a finished stage again."""
        for name, value in ((IDENTITY, identity), (CONFIGURATION, self.configuration)):
            if not value:
                continue
            file = storage.join(path, name)
            if problem := _problem(file):
                self.say(problem)
                storage.write_json(file, value)

    def track(self) -> Tracker | None:
        """The stage's MLflow run; opened on the first call."""
        if self.tracker is None and self._start_tracking is not None:
            self.tracker = self._start_tracking()
        return self.tracker

    def complete(self, path: str, identity: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
        """Write `path/summary.json`, which marks the stage as finished, as the last file; returns its content.

        Adds `format_version`, the identity and the seconds since `begin`, and logs the summary's numbers to MLflow. A non-finite number is
        null in the file and NaN in the returned mapping.
        """
        seconds = round(time.monotonic() - self._began, 3)
        record = {"format_version": FORMAT_VERSION, "stage": self.name, "seconds": seconds, **summary, "identity": identity}
        step = int(summary.get("images_seen") or summary.get("images", 0))  # an imported model has no count of images seen
        self.log({name: float(value) for name, value in record.items() if _is_number(value)}, step)
        storage.write_json(storage.join(path, SUMMARY), {**null_for_nan(record), "identity": identity})
        return record


def read_summary(path: str, remedy: str) -> dict[str, Any]:
    """`path/summary.json` of a finished stage. Raises FileNotFoundError, and DamagedFileError with the `remedy`."""
    summary: dict[str, Any] = storage.read_json(storage.join(path, SUMMARY), Summary, remedy)
    return summary


def read_identity(path: str) -> dict[str, Any]:
    """`path/identity.json`. Raises FileNotFoundError, and DamagedFileError."""
    identity: dict[str, Any] = storage.read_json(storage.join(path, IDENTITY), dict[str, Any], CLAIM_AGAIN)
    return identity


def _problem(file: str) -> str:
    """Why a JSON file has to be written again; empty if it is intact."""
    if not storage.exists(file):
        return f"{file} is missing; it is written again"
    try:
        storage.read_json(file, dict[str, Any], "it is written again")
    except DamagedFileError as error:
        return str(error)
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_other_identity(path: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = [
        f"{name} (found {found.get(name)!r}, expected {expected.get(name)!r})"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differing:
        raise UserError(
            f"{path} holds an output of another configuration; differing settings: {'; '.join(differing)}",
            remedy=f"choose another path, restore these settings (see {storage.join(path, IDENTITY)}), or delete that directory",
        )


@contextmanager
def open_stage(
    name: str,
    path: str,
    configuration: dict[str, Any],
    cluster: ClusterSettings,
    tracking: TrackingSettings,
    parent: Tracker | None = None,
    seed: int = 0,
) -> Iterator[Stage]:
    """A stage with Ray connected. On exit, also after an error, Ray is disconnected and the stage's MLflow run is closed.

    Ray's log messages go to `ray.log` in `path` (in the working directory when `path` is on S3). Raises UserError while another process
    works in `path`.
    """
    log = Path(path) / "ray.log" if storage.is_local(path) else Path(f"{name}-ray.log")

    def start_tracking() -> Tracker:
        return Tracker.open(
            tracking, name, configuration, path, parent, say=lambda text: console().print(text, markup=False, soft_wrap=True)
        )

    stage = Stage(name, cluster, configuration, start_tracking, seed)
    status = "FAILED"
    try:
        with _alone_in(path), connected(cluster, log, stage.say):
            yield stage
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if stage.tracker is not None:
            with held_back():
                stage.tracker.close(status)


@contextmanager
def _alone_in(path: str) -> Iterator[None]:
    """Lock `path` for this process; the operating system releases the lock when the process ends. (S3 has no locks.)"""
    if not storage.is_local(path):
        yield
        return
    storage.make_directory(path)
    with storage.writing(path):
        lock = open(Path(path) / LOCK, "a+")  # noqa: SIM115  # closed below
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                f"{path} is in use by another run (process {lock.read().strip() or 'unknown'})",
                remedy="wait for it, or choose another path",
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
