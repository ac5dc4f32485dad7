"""Checks before a long job: everything that a configuration needs, each with a tick or a remedy."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jobs.doctor.paths import Check, attempt, existing_parent, input_check, output_check, tracking_check
from jobs.estimate import cache_bytes, checkpoint_bytes, sample_bytes
from jobs.stage_commands import STAGES
from jobs.stages import value_at
from pipelines.runtime import storage
from pipelines.runtime.cluster.connection import unreachable
from pipelines.runtime.errors import UserError

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig

DIGITS = (4500, 10)  # training images and classes of the demo
IMAGENET = (1_281_167, 1000)  # assumed if the source cannot be read


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


def tokenizer_check(config: "RunConfig") -> Check:
    """The tokenizer's weights and their digest, if they exist already."""
    from pipelines.tokenizing.directory import check_tokenizer_files, tokenizer_digest

    path = config.tokenizer.path
    there, reason = attempt(lambda: storage.exists(storage.join(path, "config.json")))
    if reason:
        return Check("tokenizer weights", False, f"{path}{reason}", "correct tokenizer.path")
    if not there:
        return Check("tokenizer weights", True, f"{path}: does not exist yet, `mar tokenize` writes it")
    _, reason = attempt(lambda: check_tokenizer_files(path))
    digest, reason = (None, reason) if reason else attempt(lambda: tokenizer_digest(path))
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
            disks.setdefault(existing_parent(value_at(config, key)).stat().st_dev, []).append(key)
    for keys in disks.values():
        free = shutil.disk_usage(existing_parent(value_at(config, keys[0]))).free
        total = sum(wanted[key] for key in keys)
        parts = ", ".join(f"{key} {_gigabytes(wanted[key])}" for key in keys)
        remedy = f"free disk space, lower train.checkpoints_kept, or put {keys[0]} elsewhere"
        yield Check("disk space", total <= free, f"{_gigabytes(total)} needed ({parts}), {_gigabytes(free)} free", remedy)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
