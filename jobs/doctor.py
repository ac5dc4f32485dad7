"""Before the long job: everything it will need, looked at now, each with a tick or the remedy."""

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

SERVER_SECONDS = 5.0  # an MLflow server answers /health at once or is not well
DIGITS = (4500, 10)  # images to train on and classes of the demo
IMAGENET = (1_281_167, 1000)  # assumed while the source can't be read


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, what was found, and what to do if it is not `ok`."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine(config: "RunConfig") -> Iterator[Check]:
    """Every check of this configuration, one after the other; none raises for what it finds."""
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
    """Print the table, row by row as it is known; whether all is well."""
    from rich.console import Console
    from rich.text import Text

    console, failed = Console(soft_wrap=True, highlight=False, markup=False, emoji=False), 0
    for check in checks:
        mark = Text("✓", "green") if check.ok else Text("✗", "bold red")
        console.print(Text.assemble(mark, f" {check.name:20} {check.found}"))
        if not check.ok:
            console.print(f"  {'':20} → {check.remedy}", markup=False)
        failed += not check.ok
    console.print("all is well" if not failed else f"{failed} to mend")
    return not failed


def ray_checks(config: "RunConfig") -> list[Check]:
    """Ray answers, or can be started; and has the processors that the workers of the widest stage take."""
    from pipelines.runtime.cluster.connection import connected
    from pipelines.runtime.cluster.workers import cluster_resources

    address = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    where = f"cluster at {address}" if address else "a Ray of this machine's own"
    if reason := _silent(address):
        return [Check("ray", False, f"{where}: {reason}", "start that cluster's head, open the way to it, or correct cluster.address")]
    try:
        with tempfile.TemporaryDirectory() as folder, connected(config.cluster, Path(folder) / "ray.log"):
            cpus, gpus = cluster_resources()
    except UserError as error:
        return [Check("ray", False, error.text, error.remedy or "see cluster.address")]
    checks = [Check("ray", True, f"{where}: {cpus:.0f} CPUs, {gpus:g} GPUs")]
    each = config.cluster.gpus_per_worker
    groups = (("tokenizer.workers",), ("cache.encoders",), ("train.workers",), ("generate.actors",), ("evaluate.actors",))
    together = (*groups[:-2], ("generate.actors", "evaluate.actors"))  # those that score take no CPU, but a GPU
    for name, there, chosen, share in (("cpus", cpus, groups, 1.0), ("gpus", gpus, together, each)):
        widest = max(chosen, key=lambda keys: sum(value_at(config, key) for key in keys))
        needed = share * sum(value_at(config, key) for key in widest)
        described = " and ".join(f"{key} {value_at(config, key)}" for key in widest)
        text = f"{needed:g} wanted ({described}, {share:g} each), {there:g} there"
        fits = needed <= there or config.cluster.autoscaling
        remedy = f"lower {' or '.join(widest)}, or give cluster.address of a larger cluster"
        checks.append(Check(name, fits, text, remedy))
    return checks


def _silent(address: str) -> str:
    """Why nothing listens at host:port or ray://host:port; Ray itself would try for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        return unreachable(parts.hostname, parts.port) if parts.hostname and parts.port else ""
    except ValueError as error:  # no number of a port
        return str(error)


def source_check(config: "RunConfig") -> tuple[tuple[int, int], Check]:
    """The image source, listed whole: (images to train on, classes), and the row."""
    from jobs.config.load import load
    from pipelines.images.listing import list_images

    source = config.images.source
    if source == load("demo").images.source and not storage.exists(source):
        return DIGITS, Check("images.source", True, f"{source}: not there yet, `mar quickstart` writes it")
    try:
        listing = list_images(config.images)
    except (UserError, OSError) as error:
        found, remedy = (error.text, error.remedy) if isinstance(error, UserError) else (str(error), "")
        return IMAGENET, Check(
            "images.source", False, found.removeprefix("images.source "), remedy or "give the folder of your images: --set images.source=…"
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
        reason = reason or ": not there"
    return Check(key, not reason, f"{path}{reason}", f"correct {key}, or bring that file")


def _read_input(key: str, path: str) -> None:
    """Raises UserError where what a stage reads first is damaged."""
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
    elif key == "generate.checkpoint" and not path.endswith(".pth"):  # its gigabytes of weights stay in the bucket
        storage.read_json(storage.join(path, STATE), CheckpointState)
    elif path.endswith(".npz"):
        FeatureStatistics.load(path)
    elif storage.exists(storage.join(path, MANIFEST)):
        read_manifest(path)


def output_check(key: str, path: str) -> Check:
    """A folder that a stage writes: a file of ours goes in and out again (locally into the nearest folder that exists)."""
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
    return Check(key, bool(written), f"{path}{'' if written else reason or ': read other bytes than written'}", remedy)


def tracking_check(uri: str) -> Check:
    """The MLflow store: a SQLite file that can be written, or a server that says it is healthy."""
    shown = without_password(uri)
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        check = output_check("tracking.uri", str(file.parent))
        if not check.ok or not file.exists():
            return Check("tracking.uri", check.ok, shown if check.ok else f"{shown}: {check.found}", check.remedy)
        _, reason = _attempt(lambda: _read_database(file))
        return Check("tracking.uri", not reason, f"{shown}{reason}", "it is no MLflow database: choose another file")
    if uri.startswith(("http://", "https://")):
        reason = _server_fault(uri)
        return Check(
            "tracking.uri", not reason, f"{shown}{reason}", "start the server, or use a file: --set tracking.uri=sqlite:///runs/mlflow.db"
        )
    return Check("tracking.uri", False, shown, "expected sqlite:///folder/file.db or http://server:port")


def tokenizer_check(config: "RunConfig") -> Check:
    """The tokenizer's weights and their digest, if they are there already."""
    from pipelines.tokenizing.directory import check_tokenizer_files, tokenizer_digest

    path = config.tokenizer.path
    there, reason = _attempt(lambda: storage.exists(storage.join(path, "config.json")))
    if reason:
        return Check("tokenizer weights", False, f"{path}{reason}", "correct tokenizer.path")
    if not there:
        return Check("tokenizer weights", True, f"{path}: not there yet, `mar tokenize` writes them")
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
    """Free space of each local disk against what this configuration puts there."""
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
        remedy = f"free some space, lower train.checkpoints_kept, or put {keys[0]} elsewhere"
        yield Check("disk space", total <= free, f"{_gigabytes(total)} wanted ({parts}), {_gigabytes(free)} free", remedy)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Its result, or why there is none, as `: reason`."""
    try:
        return work(), ""
    except (OSError, UserError, sqlite3.Error) as error:
        reason = error.__cause__ if isinstance(error, storage.UnwritableError) else error
        return None, f": {' '.join(str(reason).split())[:200]}"


def _bucket_refuses(path: str) -> tuple[str, str] | None:
    """For s3://bucket/…: what is wrong with the bucket or the credentials, and what to do."""
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
            return f"there is no bucket {parts.hostname}", "make the bucket, or correct its name"
        return f"bucket {parts.hostname} refuses us ({status})", "give these credentials the right to list, read and write it"
    except (BotoCoreError, ValueError) as error:
        return (
            f"S3 can't be asked ({error})",
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
    """Why the MLflow server at `uri` (which may hold user:password@) does not say that it is healthy."""
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
    """The path itself, or the nearest one above it that exists."""
    place = Path(path.removeprefix("file://")).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return place


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
