"""MLflow: one run per stage, nested under a parent run; only the driver writes (SQLite allows a single writer)."""

import contextlib
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.runtime import storage
from pipelines.runtime.environment import environment
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.settings import operational

RECORD = "mlflow_run.json"  # in a stage's output: the ID of its MLflow run
PARAMETERS_A_CALL = 100  # MLflow refuses larger batches
METRICS_A_CALL = 1000
LONGEST_PARAMETER = 6000
FLUSH_SECONDS = 2.0
ABANDONED_SECONDS = 60.0  # an incomplete store that has not changed for this time is deleted
RETRY_SECONDS = 60.0  # interval between attempts while the server does not answer


@dataclass
class TrackingSettings:
    """Section `tracking`."""

    uri: str = operational("sqlite:///runs/mlflow.db", "MLflow store: a sqlite:/// file, or the http:// address of a server")
    experiment: str = operational("mar-ray", "MLflow experiment")
    artifacts: str = operational("", "root of the artefacts; empty: next to the SQLite file, or the server's default")


@dataclass(frozen=True)
class RunRecord:
    """Content of `mlflow_run.json`."""

    run_id: str


class Tracker:
    """One MLflow run. `Tracker.open` resumes or creates it; `log` buffers metrics; `close` ends it."""

    def __init__(self, client: Any, run_id: str, settings: TrackingSettings, parent: "Tracker | None", say: Callable[[str], None]) -> None:
        self.run_id = run_id
        self.parent = parent
        self._client = client
        self._settings = settings
        self._uri = settings.uri
        self._say = say
        self._lock = threading.RLock()  # the thread that receives worker messages logs metrics too
        self._waiting: list[Any] = []
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        self._away = False

    @classmethod
    def open(
        cls,
        settings: TrackingSettings,
        name: str,
        configuration: dict[str, Any],
        path: str,
        parent: "Tracker | None" = None,
        say: Callable[[str], None] = print,
    ) -> "Tracker":
        """Start the MLflow run of the stage `name` with output at `path`, or resume the run recorded in `path/mlflow_run.json`.

        `configuration` is {section: {key: value}} and becomes parameters `section.key`. MLflow keeps the first value of a parameter; a
        value that has changed since is recorded as tag `resumed.section.key`. `say` prints a line for the user. Raises UserError within
        seconds when the store cannot be reached or written.
        """
        record = storage.join(path, RECORD)
        earlier = None
        if storage.exists(record):
            try:
                earlier = storage.read_json(record, RunRecord, "a new run is opened in MLflow")["run_id"]
            except DamagedFileError as error:
                say(str(error))
        with _as_user_error(settings.uri), _short_waits():
            client = _client(settings)
            experiment = _experiment(client, settings)
            run_id = earlier if earlier and _is_there(client, earlier) else None
            tags = {"path": path} | ({"mlflow.parentRunId": parent.run_id} if parent else {})
            if run_id is None:
                run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
            else:
                client.update_run(run_id, status="RUNNING")
                for key, value in tags.items():
                    client.set_tag(run_id, key, value)
            _log_parameters(client, run_id, flatten(configuration))
        if run_id != earlier:
            storage.write_json(record, {"run_id": run_id, "uri": without_password(settings.uri)})
        return cls(client, run_id, settings, parent, say)

    def child(self, name: str, configuration: dict[str, Any], path: str) -> "Tracker | None":
        """A run nested under this one in the same store; if the store does not answer, prints a message and returns None."""
        try:
            return Tracker.open(self._settings, name, configuration, path, self, self._say)
        except storage.UnwritableError:  # not an error of MLflow
            raise
        except UserError as error:
            self._say(f"{name} is not in MLflow: {error}")
            return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a step (images seen). Non-finite values are recorded as NaN, so that the latest value of a diverged run is not
        its last finite value. (MLflow sorts NaN last, but stores infinity as 1.8e308.)"""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._lock:
            for key, value in metrics.items():
                self._waiting.append(Metric(key, float(value) if math.isfinite(value) else math.nan, now, int(step)))
            if time.monotonic() >= self._next_flush:
                self._flush()

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        try:
            with _short_waits():
                for name, value in tags.items():
                    self._client.set_tag(self.run_id, name, value[:LONGEST_PARAMETER])
        except Exception as error:  # a failing store must not end a stage
            self._say(f"MLflow did not accept the tags {', '.join(tags)}: {_without_secrets(error, self._uri)}")

    def artifact(self, path: str) -> None:
        """Upload a local file or folder to the run's artefacts."""
        self._flush()
        try:
            with _short_waits():
                if Path(path).is_dir():
                    self._client.log_artifacts(self.run_id, path, artifact_path=Path(path).name)
                else:
                    self._client.log_artifact(self.run_id, path)
        except Exception as error:  # a failing store must not end a stage
            self._say(f"MLflow did not accept the artefact {path}: {_without_secrets(error, self._uri)}")

    def close(self, status: str = "FINISHED") -> None:
        """End the run with status FINISHED, FAILED or KILLED. An unreachable store is logged and never raised: the work is finished."""
        self._flush()
        if self._waiting:
            self._say(f"MLflow at {without_password(self._uri)} does not answer; {len(self._waiting)} metrics were not stored")
        try:
            with _short_waits():
                self._client.set_terminated(self.run_id, status)
        except Exception as error:  # a failing store must not end a stage
            self._say(f"MLflow run {self.run_id} could not be closed: {_without_secrets(error, self._uri)}")

    def _flush(self) -> None:
        """Send the buffered metrics. On failure they are kept and sent again later: a long training must survive an MLflow outage."""
        with self._lock:
            try:
                with _short_waits():
                    while self._waiting:
                        self._client.log_batch(self.run_id, metrics=self._waiting[:METRICS_A_CALL])
                        del self._waiting[:METRICS_A_CALL]
                self._away = False
            except Exception as error:  # a failing store must not end a stage
                if not self._away:
                    self._say(f"MLflow does not answer; metrics are kept and sent later: {_without_secrets(error, self._uri)}")
                self._away = True
            self._next_flush = time.monotonic() + (RETRY_SECONDS if self._away else FLUSH_SECONDS)


def flatten(configuration: Mapping[str, Any]) -> dict[str, str]:
    """{section: {key: value}} as {`section.key`: text}; lists and mappings become JSON; a plain value keeps its name."""
    flat: dict[str, str] = {}
    for section, values in configuration.items():
        for key, value in (values if isinstance(values, Mapping) else {"": values}).items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else str(value)
            if len(text) > LONGEST_PARAMETER:
                note = f" … (cut: {len(text)} characters)"
                text = text[: LONGEST_PARAMETER - len(note)] + note
            flat[f"{section}.{key}" if key else section] = text
    return flat


def without_password(uri: str) -> str:
    """The URI without credentials: in `scheme://user:password@host` everything up to the @ is removed."""
    return re.sub(r"://[^/\s]*@", "://", uri)  # up to the last @: a password may contain one


def _without_secrets(error: Exception, uri: str) -> str:
    secrets = re.findall(r"://[^/:\s]*:([^/\s]+)@", uri)
    text = without_password(str(error).strip().split("\n")[0])
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


@contextmanager
def _as_user_error(uri: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the store, its driver or the network
        remedy = (
            "start that server, or keep the runs in a file with tracking.uri=sqlite:///runs/mlflow.db"
            if uri.startswith("http")
            else "set it to a writable sqlite:///folder/file.db or the http:// address of an MLflow server"
        )
        # `from None`: the text of the cause may contain the password
        raise UserError(f"tracking.uri {without_password(uri)!r} can't be used: {_without_secrets(error, uri)}", remedy) from None


def _short_waits() -> AbstractContextManager[None]:
    """MLflow's default retries (minutes) would block a stage; MLflow reads both settings from the environment."""
    return environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"})


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute() if uri.startswith("sqlite:///") else None


def _client(settings: TrackingSettings) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient  # takes a second: imported only when a run is opened

    for chatter in ("mlflow", "alembic"):
        logging.getLogger(chatter).setLevel(logging.WARNING)
    file = _sqlite_file(settings.uri)
    if file and not file.exists():
        _create_store(file)
    elif file and file.stat().st_size == 0:  # MLflow would silently create a new store in it
        raise UserError(
            f"{file} (tracking.uri) is damaged: the file is empty", remedy="restore it from a copy, or delete it to start a new store"
        )
    return MlflowClient(settings.uri)


def _create_store(file: Path) -> None:
    """Create MLflow's tables in a new SQLite file atomically: MLflow cannot open a store with only some of them."""
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    for partial in file.parent.glob(f"{file.name}.*.partial*"):
        if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
            partial.unlink(missing_ok=True)
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.partial")
    MlflowClient(f"sqlite:///{partial}").search_experiments()
    with contextlib.suppress(FileExistsError):  # another process has created the store
        os.link(partial, file)
    partial.unlink()


def _experiment(client: Any, settings: TrackingSettings) -> str:
    """The experiment's ID. Its artefact root is set on creation and cannot change later."""
    file = _sqlite_file(settings.uri)
    root = settings.artifacts or (str(file.parent / "artifacts") if file else None)
    if root and "://" not in root:
        root = Path(root).expanduser().absolute().as_uri()
    found = client.get_experiment_by_name(settings.experiment)
    if found is None:
        return str(client.create_experiment(settings.experiment, artifact_location=root))
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment {settings.experiment!r} was deleted in MLflow", remedy="restore it there or choose another name"
        )
    if settings.artifacts and root and found.artifact_location.rstrip("/") != root.rstrip("/"):
        raise UserError(
            f"tracking.artifacts is {settings.artifacts!r}, but the experiment {settings.experiment!r} keeps its artefacts at "
            f"{found.artifact_location!r}, which MLflow can't change",
            remedy="leave tracking.artifacts empty or choose another tracking.experiment",
        )
    return str(found.experiment_id)


def _is_there(client: Any, run_id: str) -> bool:
    """Whether the store still has the run of an earlier attempt."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise


def _log_parameters(client: Any, run_id: str, flat: dict[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    logged = client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in flat.items() if key not in logged]
    for start in range(0, len(new), PARAMETERS_A_CALL):
        client.log_batch(run_id, params=new[start : start + PARAMETERS_A_CALL])
    changed = [RunTag(f"resumed.{key}", value[:LONGEST_PARAMETER]) for key, value in flat.items() if logged.get(key, value) != value]
    for start in range(0, len(changed), PARAMETERS_A_CALL):
        client.log_batch(run_id, tags=changed[start : start + PARAMETERS_A_CALL])
