"""The checkpoints of a training run: `checkpoints/images-…`, each one whole or not there, the newest that verifies, the oldest dropped."""

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mar_model import __version__
from mar_model.checkpoint import STATE, read_state, save_checkpoint
from mar_model.ema import WeightAverage
from mar_model.mar import MAR
from pipelines import storage
from pipelines.latents import LatentCache

if TYPE_CHECKING:
    from pipelines.training_worker import TrainingJob

logger = logging.getLogger(__name__)

PREFIX = "images-"
UNFINISHED = ".writing-"


def write_checkpoint(
    job: "TrainingJob",
    cache: LatentCache,
    model: MAR,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> str:
    """Publish `checkpoints/images-…` whole or not at all, then drop the oldest beyond `train.checkpoints_kept`. Returns its path.

    `progress` is what the loop goes on from: `images_seen`, `step`, and `intervals`, the newest lines of metrics.
    """
    train, manifest = job.train, cache.manifest
    state = {
        **progress,
        "seed": job.seed,
        "code_version": __version__,
        "train": asdict(train),
        "cache_digest": cache.digest,
        "tokenizer": {"path": job.tokenizer_path, "digest": manifest.tokenizer["digest"]},
        "class_names": manifest.class_names,
        "image_size": manifest.image_size,
        **{name: getattr(manifest, name) for name in ("latent_mean", "latent_std", "latent_min", "latent_max")},
    }
    folder = storage.join(train.path, "checkpoints")
    path = storage.join(folder, f"{PREFIX}{progress['images_seen']:012d}")
    scratch = str(Path(folder)) if storage.is_local(folder) else None
    if scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=UNFINISHED) as temporary:
        save_checkpoint(Path(temporary) / "checkpoint", model, average.weights, state, optimizer)
        storage.publish_directory(Path(temporary) / "checkpoint", path, last=STATE)
    for name in _checkpoint_names(train.path)[: -train.checkpoints_kept]:
        storage.delete(storage.join(folder, name))
    return path


def _checkpoint_names(train_path: str) -> list[str]:
    names = storage.list_directory(storage.join(train_path, "checkpoints"))
    return [name for name in names if name.startswith(PREFIX) and not name.endswith(".partial")]


def forget_lost_attempts(train_path: str) -> None:
    """Delete what a killed run left half written, and Ray's own list of checkpoints: that is not written atomically and can lag
    behind, so we go by what is on disk and verifies."""
    folder = storage.join(train_path, "checkpoints")
    for name in storage.list_directory(folder):
        if name.startswith(UNFINISHED) or name.endswith(".partial") or name == "checkpoint_manager_snapshot.json":
            storage.delete(storage.join(folder, name))


def newest_checkpoint(train_path: str) -> str | None:
    """The newest checkpoint of a run whose files all match their digests; damaged ones are named in a warning and passed over."""
    for name in reversed(_checkpoint_names(train_path)):
        path = storage.join(train_path, "checkpoints", name)
        try:
            read_state(storage.local_directory(path))
        except ValueError as error:
            logger.warning("checkpoint passed over: %s", error)
            continue
        return path
    return None
