"""Checks before a long job: everything that a configuration needs, each with a tick or a remedy."""

import base64
import os
import shutil
import sqlite3
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qsl, urlsplit

from jobs.estimate import cache_bytes, checkpoint_bytes, sample_bytes
from jobs.stage_commands import STAGES
from jobs.stages import value_at
from pipelines.runtime import s3, storage
from pipelines.runtime.cluster.connection import unreachable
from pipelines.runtime.errors import UserError
from pipelines.runtime.tracking import without_password

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig

T = TypeVar("T")

SERVER_SECONDS = 5.0  # timeout; a healthy MLflow server answers /health at once
DIGITS = (4500, 10)  # training images and classes of the demo
IMAGENET = (1_281_167, 1000)  # assumed if the source cannot be read


@dataclass(frozen=True)
class Check:
    """One row: what was checked, what was found, and the remedy if it is not `ok`."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine(config: "RunConfig") -> Iterator[Check]:
    """Run all checks of this configuration, one after the other. No check raises for what it finds."""
    yield from ray_checks(config)
    (images, classes), check = source_check(config)
    yield check
    for key in ("evaluate.reference", "evaluate.classifier", "generate.checkpoint"):
        if path := value_at(config, key):
            yield input_check(key, path)
    for stage in STAGES.values():
        yield output_check(stage.writes, value_at(config, stage.writes))
    yield tracking_check(config.tracking.uri)
    yield tokenizer_check(config)
    yield network_check(config)
    yield from disk_checks(config, images, classes)


def show(checks: Iterator[Check]) -> bool:
    """Print each row as soon as it is known. Returns whether all checks passed."""
    from rich.console import Console
    from rich.text import Text

    console, failed = Console(soft_wrap=True, highlight=False, markup=False, emoji=False), 0
    for check in checks:
        mark = Text("✓", "green") if check.ok else Text("✗", "bold red")
        console.print(Text.assemble(mark, f" {check.name:20} {check.found}"))
        if not check.ok:
            console.print(f"  {'':20} → {check.remedy}", markup=False)
        failed += not check.ok
    console.print("all checks passed" if not failed else f"{failed} to fix")
    return not failed


def ray_checks(config: "RunConfig") -> list[Check]:
    """Check that Ray answers or can be started, and has the CPUs and GPUs for the workers of the largest stage."""
    from pipelines.runtime.cluster.connection import connected
    from pipelines.runtime.cluster.workers import cluster_resources

    address = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    where = f"cluster at {address}" if address else "a local Ray instance"
    if reason := _silent(address):
        return [Check("ray", False, f"{where}: {reason}", "start the head node, make it reachable, or correct cluster.address")]
    try:
        with tempfile.TemporaryDirectory() as folder, connected(config.cluster, Path(folder) / "ray.log"):
            cpus, gpus = cluster_resources()
    except UserError as error:
        return [Check("ray", False, error.text, error.remedy or "see cluster.address")]
    checks = [Check("ray", True, f"{where}: {cpus:.0f} CPUs, {gpus:g} GPUs")]
    each = config.cluster.gpus_per_worker
    groups = (("tokenizer.workers",), ("cache.encoders",), ("train.workers",), ("generate.actors",), ("evaluate.actors",))
    together = (*groups[:-2], ("generate.actors", "evaluate.actors"))  # scoring actors take a GPU, but no CPU
    for name, available, chosen, share in (("cpus", cpus, groups, 1.0), ("gpus", gpus, together, each)):
        widest = max(chosen, key=lambda keys: sum(value_at(config, key) for key in keys))
        needed = share * sum(value_at(config, key) for key in widest)
        described = " and ".join(f"{key} {value_at(config, key)}" for key in widest)
        text = f"{needed:g} needed ({described}, {share:g} each), {available:g} available"
        fits = needed <= available or config.cluster.autoscaling
        remedy = f"lower {' or '.join(widest)}, or set cluster.address to a larger cluster"
        checks.append(Check(name, fits, text, remedy))
    return checks


def _silent(address: str) -> str:
    """Why host:port or ray://host:port is unreachable; empty if it is reachable. Ray itself would try for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        return unreachable(parts.hostname, parts.port) if parts.hostname and parts.port else ""
    except ValueError as error:  # no number of a port
        return str(error)


def source_check(config: "RunConfig") -> tuple[tuple[int, int], Check]:
    """List the image source. Returns (training images, classes) and the row."""
    from jobs.config.load import load
    from pipelines.images.listing import list_images

    source = config.images.source
    if source == load("demo").images.source and not storage.exists(source):
        return DIGITS, Check("images.source", True, f"{source}: does not exist yet, `mar quickstart` writes it")
    try:
        listing = list_images(config.images)
    except (UserError, OSError) as error:
        found, remedy = (error.text, error.remedy) if isinstance(error, UserError) else (str(error), "")
        return IMAGENET, Check(
            "images.source", False, found.removeprefix("images.source "), remedy or "set it to your images: --set images.source=…"
        )
    text = f"{source}: {len(listing.rows):,} images, {len(listing.held_out()):,} of them held out, {len(listing.class_names)} classes"
    text = "; ".join([text, *listing.remarks])
    return (len(listing.train()), len(listing.class_names)), Check("images.source", True, text)


def input_check(key: str, path: str) -> Check:
    """A file or folder that a stage reads."""
    if refused := _bucket_refuses(path):
        return Check(key, False, f"{path}: {refused[0]}", refused[1])
    there, reason = _attempt(lambda: storage.exists(path))
    if there:
        _, reason = _attempt(lambda: _read_input(key, path))
    else:
        reason = reason or ": does not exist"
    return Check(key, not reason, f"{path}{reason}", f"correct {key}, or restore that file")


def _read_input(key: str, path: str) -> None:
    """Raises UserError if the file that a stage reads first is damaged."""
    from mar_model.checkpoints.checkpoint import STATE
    from pipelines.caching.latent_cache import read_manifest
    from pipelines.caching.latent_format import MANIFEST
    from pipelines.checkpoints.directory import CheckpointState, read_checkpoint
    from pipelines.evaluation.classifier import load_classifier
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
    place = str(_existing(path)) if storage.is_local(path) else path
    if storage.is_local(path) and not Path(place).is_dir():
        return Check(key, False, f"{path}: {place} is a file", f"move that file, or choose another {key}")
    probe = storage.join(place, f".mar-doctor-{uuid.uuid4().hex[:8]}")

    def write() -> bool:
        storage.write_bytes(probe, b"mar doctor")
        right = storage.read_bytes(probe) == b"mar doctor"
        storage.delete(probe)
        return right

    written, reason = _attempt(write)
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
        _, reason = _attempt(lambda: _read_database(file))
        return Check("tracking.uri", not reason, f"{shown}{reason}", "it is not an MLflow database: choose another file")
    if uri.startswith(("http://", "https://")):
        reason = _server_fault(uri)
        return Check(
            "tracking.uri", not reason, f"{shown}{reason}", "start the server, or use a file: --set tracking.uri=sqlite:///runs/mlflow.db"
        )
    return Check("tracking.uri", False, shown, "expected sqlite:///folder/file.db or http://server:port")


def tokenizer_check(config: "RunConfig") -> Check:
    """The tokenizer's weights and their digest, if they exist already."""
    from pipelines.tokenizing.directory import check_tokenizer_files, tokenizer_digest

    path = config.tokenizer.path
    there, reason = _attempt(lambda: storage.exists(storage.join(path, "config.json")))
    if reason:
        return Check("tokenizer weights", False, f"{path}{reason}", "correct tokenizer.path")
    if not there:
        return Check("tokenizer weights", True, f"{path}: does not exist yet, `mar tokenize` writes it")
    _, reason = _attempt(lambda: check_tokenizer_files(path))
    digest, reason = (None, reason) if reason else _attempt(lambda: tokenizer_digest(path))
    return Check("tokenizer weights", bool(digest), f"{path}: {digest}" if digest else f"{path}{reason}", "run `mar tokenize` again")


def network_check(config: "RunConfig") -> Check:
    """The feature network's weights and their digest."""
    from pipelines.evaluation.features import network_digest

    network = config.evaluate.features
    try:
        return Check("feature network", True, f"{network}: {network_digest(network, config.evaluate.weights)}")
    except UserError as error:
        found, _, remedy = str(error).partition(": ")
        return Check("feature network", False, found, remedy)


def disk_checks(config: "RunConfig", images: int, classes: int) -> Iterator[Check]:
    """Free space of each local disk, compared with what this configuration writes there."""
    wanted = {
        "cache.path": cache_bytes(config, images),
        "train.path": checkpoint_bytes(config, classes),
        "evaluate.path": sample_bytes(config),
    }
    disks: dict[int, list[str]] = {}
    for key in wanted:
        if storage.is_local(value_at(config, key)):
            disks.setdefault(_existing(value_at(config, key)).stat().st_dev, []).append(key)
    for keys in disks.values():
        free = shutil.disk_usage(_existing(value_at(config, keys[0]))).free
        total = sum(wanted[key] for key in keys)
        parts = ", ".join(f"{key} {_gigabytes(wanted[key])}" for key in keys)
        remedy = f"free disk space, lower train.checkpoints_kept, or put {keys[0]} elsewhere"
        yield Check("disk space", total <= free, f"{_gigabytes(total)} needed ({parts}), {_gigabytes(free)} free", remedy)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
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


def _existing(path: str) -> Path:
    """The path itself, or its nearest existing parent."""
    place = Path(path.removeprefix("file://")).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return place


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
