"""The checkpoints of a training run: `checkpoints/images-…`, each one whole or not there, the newest that verifies, the oldest dropped."""

import importlib.metadata
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mar_model.checkpoint import STATE, read_state, save_checkpoint
from mar_model.ema import WeightAverage
from mar_model.mar import MAR
from pipelines import storage
from pipelines.latents import LatentCache

if TYPE_CHECKING:
    from pipelines.training_worker import TrainingJob

logger = logging.getLogger(__name__)


def write_checkpoint(
    job: "TrainingJob",
    cache: LatentCache,
    model: MAR,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    *,
    images_seen: int,
    step: int,
) -> str:
    """Publish `checkpoints/images-…` whole or not at all, then drop the oldest beyond `train.checkpoints_kept`. Returns its path."""
    train, manifest = job.train, cache.manifest
    state = {
        "images_seen": images_seen,
        "step": step,
        "seed": job.seed,
        "code_version": importlib.metadata.version("mar-ray"),
        "train": asdict(train),
        "cache_digest": cache.digest,
        "tokenizer": {"path": job.tokenizer_path, "digest": manifest.tokenizer["digest"]},
        "class_names": manifest.class_names,
        "image_size": manifest.image_size,
        **{name: getattr(manifest, name) for name in ("latent_mean", "latent_std", "latent_min", "latent_max")},
    }
    folder = storage.join(train.path, "checkpoints")
    path = storage.join(folder, f"images-{images_seen:012d}")
    scratch = str(Path(folder)) if storage.is_local(folder) else None
    if scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".writing-") as temporary:
        save_checkpoint(Path(temporary) / "checkpoint", model, average.weights, state, optimizer)
        storage.publish_directory(Path(temporary) / "checkpoint", path, last=STATE)
    for name in _checkpoint_names(train.path)[: -train.checkpoints_kept]:
        storage.delete(storage.join(folder, name))
    return path


def _checkpoint_names(train_path: str) -> list[str]:
    names = storage.list_directory(storage.join(train_path, "checkpoints"))
    return [name for name in names if name.startswith("images-") and not name.endswith(".partial")]


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
