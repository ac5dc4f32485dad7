"""Checks of the paths, buckets and MLflow stores that a configuration names."""

import base64
import sqlite3
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

from pipelines.runtime import s3, storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.tracking import without_password

T = TypeVar("T")

SERVER_SECONDS = 5.0  # timeout; a healthy MLflow server answers /health at once


@dataclass(frozen=True)
class Check:
    """One row: what was checked, what was found, and the remedy if it is not `ok`."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def input_check(key: str, path: str) -> Check:
    """A file or folder that a stage reads."""
    if refused := _bucket_refuses(path):
        return Check(key, False, f"{path}: {refused[0]}", refused[1])
    there, reason = attempt(lambda: storage.exists(path))
    if there:
        _, reason = attempt(lambda: _read_input(key, path))
    else:
        reason = reason or ": does not exist"
    return Check(key, not reason, f"{path}{reason}", f"correct {key}, or restore that file")


def _read_input(key: str, path: str) -> None:
    """Raises UserError if the file that a stage reads first is damaged."""
    from mar_model.checkpoints.checkpoint import STATE
    from pipelines.caching.latent_cache import read_manifest
    from pipelines.caching.latent_format import MANIFEST
    from pipelines.checkpoints.directory import CheckpointState, read_checkpoint
    from pipelines.evaluation.classifier.network import load_classifier
    from pipelines.evaluation.statistics import FeatureStatistics

    if key == "evaluate.classifier":
        load_classifier(path)
    elif key == "generate.checkpoint" and storage.is_local(path) and not path.endswith(".pth"):
        read_checkpoint(path)
    elif key == "generate.checkpoint" and not path.endswith(".pth"):  # without downloading the weights
        storage.read_json(storage.join(path, STATE), CheckpointState)
    elif path.endswith(".npz"):
        FeatureStatistics.load(path)
    elif storage.exists(storage.join(path, MANIFEST)):
        read_manifest(path)


def output_check(key: str, path: str) -> Check:
    """A folder that a stage writes: write a file to it and read it back (locally in the nearest existing parent)."""
    if refused := _bucket_refuses(path):
        return Check(key, False, f"{path}: {refused[0]}", refused[1])
    place = str(existing_parent(path)) if storage.is_local(path) else path
    if storage.is_local(path) and not Path(place).is_dir():
        return Check(key, False, f"{path}: {place} is a file", f"move that file, or choose another {key}")
    probe = storage.join(place, f".mar-doctor-{uuid.uuid4().hex[:8]}")

    def write() -> bool:
        storage.write_bytes(probe, b"mar doctor")
        right = storage.read_bytes(probe) == b"mar doctor"
        storage.delete(probe)
        return right

    written, reason = attempt(write)
    remedy = f"make {place} writable for this user, or choose another {key}"
    return Check(key, bool(written), f"{path}{'' if written else reason or ': other bytes were read than written'}", remedy)


def tracking_check(uri: str) -> Check:
    """The MLflow store: a writable SQLite file, or a healthy server."""
    shown = without_password(uri)
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        check = output_check("tracking.uri", str(file.parent))
        if not check.ok or not file.exists():
            return Check("tracking.uri", check.ok, shown if check.ok else f"{shown}: {check.found}", check.remedy)
        _, reason = attempt(lambda: _read_database(file))
        return Check("tracking.uri", not reason, f"{shown}{reason}", "it is not an MLflow database: choose another file")
    if uri.startswith(("http://", "https://")):
        reason = _server_fault(uri)
        return Check(
            "tracking.uri", not reason, f"{shown}{reason}", "start the server, or use a file: --set tracking.uri=sqlite:///runs/mlflow.db"
        )
    return Check("tracking.uri", False, shown, "expected sqlite:///folder/file.db or http://server:port")


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Return (result, "") or, if `work` raises, (None, ": reason")."""
    try:
        return work(), ""
    except (OSError, UserError, sqlite3.Error) as error:
        reason = error.__cause__ if isinstance(error, storage.UnwritableError) else error
        return None, f": {' '.join(str(reason).split())[:200]}"


def _bucket_refuses(path: str) -> tuple[str, str] | None:
    """For s3://bucket/…: the problem with the bucket or the credentials, and the remedy; None if there is none."""
    if not path.startswith("s3://"):
        return None
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(path)
    try:
        boto3.client("s3", endpoint_url=s3.endpoint_url(dict(parse_qsl(parts.query)))).head_bucket(Bucket=parts.hostname or "")
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 404:
            return f"bucket {parts.hostname} does not exist", "create the bucket, or correct its name"
        return f"bucket {parts.hostname} denies access ({status})", "allow these credentials to list, read and write it"
    except (BotoCoreError, ValueError) as error:
        return (
            f"the request to S3 failed ({error})",
            "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the region",
        )
    return None


def _read_database(file: Path) -> None:
    if not file.stat().st_size:
        raise sqlite3.DatabaseError("the file is empty")
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=SERVER_SECONDS)) as database:
        [(found,)] = database.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise sqlite3.DatabaseError(found)


def _server_fault(uri: str) -> str:
    """Why the MLflow server at `uri` (which may contain user:password@) is not healthy; empty if it is."""
    user, _, password = (urlsplit(uri).netloc.rpartition("@")[0]).partition(":")
    request = urllib.request.Request(f"{without_password(uri).rstrip('/')}/health")
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS):
            return ""
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f": {error}"


def existing_parent(path: str) -> Path:
    """The path itself, or its nearest existing parent."""
    place = Path(path.removeprefix("file://")).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return place
