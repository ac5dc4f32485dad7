"""The checkpoints of a training run: `checkpoints/images-…`, each written atomically, and the newest valid one."""

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mar_model.checkpoints.checkpoint import STATE, read_state, write_checkpoint
from mar_model.config import MARConfig
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError
from pipelines.runtime.progress import console

PREFIX = "images-"
VALIDATION = "validation"  # folder next to `checkpoints` with validation results, by checkpoint name
UNFINISHED = ".writing-"


ANOTHER_CHECKPOINT = "use another checkpoint, or restore this one from a copy"


@dataclass(frozen=True)
class MetricsRow:
    """Fields of every row of metrics."""

    images_seen: int
    loss: float | None  # null: not finite


@dataclass(frozen=True)
class TokenizerOf:
    """The tokenizer of a checkpoint's latents; the digest is None for an imported checkpoint with an unknown tokenizer."""

    path: str
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Fields of `state.json` about the weights: the files with their digests, the training settings, and the class names."""

    files: dict[str, str]
    train: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointState(Weights):
    """Fields of `state.json` that every reader needs, in addition to those that `mar_model.checkpoints.checkpoint.read_state` checks."""

    images_seen: int | None  # None: an imported checkpoint, where it is unknown
    image_size: int
    latent_mean: list[float]
    latent_std: list[float]
    latent_min: list[float] | None
    latent_max: list[float] | None
    tokenizer: TokenizerOf


@dataclass(frozen=True, kw_only=True)
class TrainingState(CheckpointState):
    """Fields of `state.json` that a training run resumes from."""

    images_seen: int
    step: int
    intervals: list[MetricsRow]
    interval: list[float]


def read_checkpoint(path: str, shape: type[Weights] = CheckpointState) -> dict[str, Any]:
    """The state of the checkpoint directory `path`. All its files match their digests.

    Raises DamagedFileError, a ValueError, that names the file which is missing, damaged, or not of type `shape`; without a remedy, which
    depends on the caller.
    """
    try:
        read_state(storage.local_directory(path))
    except ValueError as error:
        raise DamagedFileError(str(error)) from error
    state: dict[str, Any] = storage.read_json(storage.join(path, STATE), shape, remedy="")
    return state


def checkpoint_path(train_path: str, images_seen: int) -> str:
    return storage.join(train_path, "checkpoints", f"{PREFIX}{images_seen:012d}")


def publish_checkpoint(train_path: str, model: MARConfig, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> str:
    """Write `tensors` (file → name → values in host memory) and `state` to `checkpoints/images-…` atomically; returns its path.

    Raises OSError when the disk is full or the bucket is unreachable, after removing the partial checkpoint.
    """
    path = checkpoint_path(train_path, state["images_seen"])
    folder = storage.join(train_path, "checkpoints")
    scratch = storage.filesystem(folder)[1] if storage.is_local(folder) else None
    if scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=UNFINISHED, ignore_cleanup_errors=True) as temporary:
        directory = Path(temporary) / "checkpoint"
        directory.mkdir()
        try:
            write_checkpoint(directory, model, tensors, state)
            storage.publish_directory(directory, path, last=STATE)
        except Exception as error:
            with contextlib.suppress(Exception):  # report the first error
                if not storage.exists(storage.join(path, STATE)):
                    storage.delete(path)
            raise OSError(f"{path}: {error.__cause__ or error}") from error
    return path


def images_of(name: str) -> int:
    """The number of images seen, from a checkpoint's name."""
    return int(name.removeprefix(PREFIX))


def last_validated(train_path: str, images_seen: int) -> int:
    """Images seen by the newest validated checkpoint up to `images_seen`; 0 if there is none."""
    names = [name.removesuffix(".json") for name in storage.list_directory(storage.join(train_path, VALIDATION)) if name.endswith(".json")]
    return max((seen for seen in map(images_of, names) if seen <= images_seen), default=0)


@dataclass(frozen=True)
class Validated:
    """Fields of `validation/images-….json` that are read again."""

    identity: str
    metrics: dict[str, float | None]


def checkpoint_names(train_path: str) -> list[str]:
    """Names of the checkpoints on disk, oldest first."""
    names = storage.list_directory(storage.join(train_path, "checkpoints"))
    return [name for name in names if name.startswith(PREFIX) and not name.endswith(storage.PARTIAL)]


def forget_lost_attempts(train_path: str) -> None:
    """Delete unfinished checkpoints of a killed run, and Ray's list of checkpoints: Ray does not write it atomically, and it can lag
    behind. The checkpoints on disk that pass verification are what counts."""
    folder = storage.join(train_path, "checkpoints")
    for name in storage.list_directory(folder):
        unfinished = name.startswith(UNFINISHED) or name.endswith(storage.PARTIAL)
        incomplete = name.startswith(PREFIX) and not storage.exists(storage.join(folder, name, STATE))  # `state.json` is written last
        if unfinished or incomplete or name == "checkpoint_manager_snapshot.json":
            storage.delete(storage.join(folder, name))


def in_terminal(text: str) -> None:
    """Print a line for the user, also while the output of this process is redirected to a file."""
    console().print(text, markup=False, soft_wrap=True)


def once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Wrap `say` so that it prints each text only once."""
    said = set[str]()

    def say_new(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    return say_new


def newest_checkpoint(train_path: str, say: Callable[[str], None] = in_terminal) -> str | None:
    """The newest checkpoint of a run that matches its digests. `say` prints a line for each newer checkpoint that is damaged."""
    for name in reversed(checkpoint_names(train_path)):
        path = storage.join(train_path, "checkpoints", name)
        try:
            read_checkpoint(path, TrainingState)
        except DamagedFileError as error:
            say(f"checkpoint {name} skipped: {error}")
            continue
        return path
    return None
