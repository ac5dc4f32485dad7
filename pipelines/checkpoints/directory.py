"""The checkpoints of a training run: `checkpoints/images-…`, each one written atomically, and the newest that verifies."""

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
VALIDATION = "validation"  # beside `checkpoints`: what validations found, by the names of the checkpoints
UNFINISHED = ".writing-"


ANOTHER_CHECKPOINT = "name another checkpoint, or bring this one back from a copy"


@dataclass(frozen=True)
class MetricsRow:
    """What every line holds."""

    images_seen: int
    loss: float | None  # null: not finite


@dataclass(frozen=True)
class TokenizerOf:
    """The tokenizer that a checkpoint's latents are from; None: of an imported checkpoint that no tokenizer is known of."""

    path: str
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The files of a checkpoint with their digests, which averages they are, and the names of the classes."""

    files: dict[str, str]
    train: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointState(Weights):
    """What every user of a checkpoint finds in its `state.json`, beside what `mar_model.checkpoints.checkpoint.read_state` checks."""

    images_seen: int | None  # None: of an imported checkpoint, which does not tell
    image_size: int
    latent_mean: list[float]
    latent_std: list[float]
    latent_min: list[float] | None
    latent_max: list[float] | None
    tokenizer: TokenizerOf


@dataclass(frozen=True, kw_only=True)
class TrainingState(CheckpointState):
    """What a training run resumes from."""

    images_seen: int
    step: int
    intervals: list[MetricsRow]
    interval: list[float]


def read_checkpoint(path: str, shape: type[Weights] = CheckpointState) -> dict[str, Any]:
    """The state of the checkpoint directory `path`, whose files all match their digests.

    Raises DamagedFileError, a ValueError, that names the file which is missing, damaged, or does not hold what `shape` says; what to do
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

    Raises OSError where the disk is full or the bucket is out of reach; what was written is removed then.
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
            with contextlib.suppress(Exception):  # the first error is the one to tell
                if not storage.exists(storage.join(path, STATE)):
                    storage.delete(path)
            raise OSError(f"{path}: {error.__cause__ or error}") from error
    return path


def images_of(name: str) -> int:
    """The images seen by the checkpoint of this name."""
    return int(name.removeprefix(PREFIX))


def last_validated(train_path: str, images_seen: int) -> int:
    """The images seen by the newest checkpoint, up to `images_seen`, that was validated; 0 where none was."""
    names = [name.removesuffix(".json") for name in storage.list_directory(storage.join(train_path, VALIDATION)) if name.endswith(".json")]
    return max((seen for seen in map(images_of, names) if seen <= images_seen), default=0)


@dataclass(frozen=True)
class Validated:
    """What is read again of `validation/images-….json`."""

    identity: str
    metrics: dict[str, float | None]


def checkpoint_names(train_path: str) -> list[str]:
    """Names of the checkpoints on disk, the oldest first."""
    names = storage.list_directory(storage.join(train_path, "checkpoints"))
    return [name for name in names if name.startswith(PREFIX) and not name.endswith(storage.PARTIAL)]


def forget_lost_attempts(train_path: str) -> None:
    """Delete what a killed run left half written, and Ray's own list of checkpoints: that is not written atomically and can lag
    behind, so we go by what is on disk and verifies."""
    folder = storage.join(train_path, "checkpoints")
    for name in storage.list_directory(folder):
        half = name.startswith(UNFINISHED) or name.endswith(storage.PARTIAL)
        cut = name.startswith(PREFIX) and not storage.exists(storage.join(folder, name, STATE))  # `state.json` comes last
        if half or cut or name == "checkpoint_manager_snapshot.json":
            storage.delete(storage.join(folder, name))


def in_terminal(text: str) -> None:
    """A line for the user, also while this process's own output goes to a file."""
    console().print(text, markup=False, soft_wrap=True)


def once(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say`, called once for each text."""
    said = set[str]()

    def say_new(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    return say_new


def newest_checkpoint(train_path: str, say: Callable[[str], None] = in_terminal) -> str | None:
    """The newest checkpoint of a run whose files all match their digests. `say` is called with a line for each damaged one before it."""
    for name in reversed(checkpoint_names(train_path)):
        path = storage.join(train_path, "checkpoints", name)
        try:
            read_checkpoint(path, TrainingState)
        except DamagedFileError as error:
            say(f"checkpoint {name} passed over: {error}")
            continue
        return path
    return None
