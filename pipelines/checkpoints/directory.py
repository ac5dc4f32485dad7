"""The checkpoints of a training run: `checkpoints/images-…`, each one whole or not there; which are kept, and the newest that verifies."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from mar_model import __version__
from mar_model.checkpoints.checkpoint import STATE, read_state, write_state
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError
from pipelines.runtime.json_numbers import nan_for_null
from pipelines.runtime.progress import console
from pipelines.training.metrics_log import MetricsRow

if TYPE_CHECKING:
    from pipelines.training.worker import TrainingJob

PREFIX = "images-"
VALIDATION = "validation"  # beside `checkpoints`: what validations found, by the names of the checkpoints
UNFINISHED = ".writing-"


ANOTHER_CHECKPOINT = "name another checkpoint, or bring this one back from a copy"


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


def checkpoint_state(job: "TrainingJob", progress: Mapping[str, Any]) -> dict[str, Any]:
    """What `state.json` holds beside the model's configuration: `progress`, which the loop goes on from (`images_seen`, `step`, and
    `intervals`, the newest lines of metrics), and all that says what the weights are."""
    manifest = job.cache.manifest
    return {
        **progress,
        "seed": job.seed,
        "code_version": __version__,
        "train": asdict(job.train),
        "cache_digest": job.cache.digest,
        "tokenizer": {"path": job.tokenizer_path, "digest": manifest.tokenizer["digest"]},
        "class_names": manifest.class_names,
        "image_size": manifest.image_size,
        **{name: getattr(manifest, name) for name in ("latent_mean", "latent_std", "latent_min", "latent_max")},
    }


def publish_checkpoint(job: "TrainingJob", tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> str:
    """Write `tensors` (file → name → values in host memory) and `state` as `checkpoints/images-…`, whole or not at all; its path.

    Raises OSError where the disk is full or the bucket is out of reach; what was written is removed then.
    """
    path = checkpoint_path(job.train.path, state["images_seen"])
    folder = storage.join(job.train.path, "checkpoints")
    scratch = storage.filesystem(folder)[1] if storage.is_local(folder) else None
    if scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=UNFINISHED, ignore_cleanup_errors=True) as temporary:
        directory = Path(temporary) / "checkpoint"
        directory.mkdir()
        try:
            for file, values in tensors.items():
                save_file(values, directory / file)
            write_state(directory, job.model, state)
            storage.publish_directory(directory, path, last=STATE)
        except Exception as error:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                if not storage.exists(storage.join(path, STATE)):
                    storage.delete(path)
            raise OSError(f"{path}: {error.__cause__ or error}") from error
    return path


def drop_old_checkpoints(newest: str, kept: int, every_images: int, scores: Mapping[str, float], damaged: set[str]) -> None:
    """Delete what is older than `newest`, a checkpoint's path, but for `kept` − 1 of them, the one with the lowest finite value of
    `scores` (name → value), and the first one of every `every_images` images (0: none). The `damaged` that the run went on from before
    are none of these, and stay until it has passed them.
    """
    folder, _, last = newest.rpartition("/")
    names = [name for name in checkpoint_names(folder.rpartition("/")[0]) if name <= last]
    passed = [name for name in names if name in damaged and name != last]
    names = [name for name in names if name not in passed]
    ranked = {name: scores[name] for name in names if math.isfinite(scores.get(name, math.nan))}
    lasting = {min(ranked, key=lambda name: ranked[name])} if ranked else set[str]()
    if every_images:
        firsts = {images_of(name) // every_images: name for name in reversed(names)}
        lasting |= {name for number, name in firsts.items() if number}
    for name in [*passed, *names[:-kept]]:
        if name not in lasting:
            storage.delete(storage.join(folder, name))


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


class Scores(dict[str, float]):
    """The checkpoints of a run that have a value of `metric`, name → value: a metric of training in the newest line that the checkpoint
    holds, or a `validation_…` that a validation of this identity has found for it (see `Validation.identity`)."""

    def __init__(self, train_path: str, metric: str, validated_as: str = "") -> None:
        super().__init__()
        self.train_path, self.metric, self.validated_as = train_path, metric, validated_as
        self.refresh()

    def refresh(self) -> None:
        """Read what has come since."""
        for name in reversed(checkpoint_names(self.train_path)) if self.metric else ():
            if name not in self:
                with contextlib.suppress(ValueError, LookupError):  # there is none, or it is damaged
                    self[name] = self._value(name)

    def _value(self, name: str) -> float:
        """Raises LookupError where there is none, ValueError where it is damaged."""
        validated = self.metric.startswith(f"{VALIDATION}_")
        file = storage.join(VALIDATION, f"{name}.json") if validated else storage.join("checkpoints", name, STATE)
        if not storage.exists(path := storage.join(self.train_path, file)):
            raise KeyError(path)
        found = storage.read_json(path, Validated if validated else TrainingState)
        if not validated:
            return float([nan_for_null(line)[self.metric] for line in found["intervals"] if self.metric in line][-1])
        if found["identity"] != self.validated_as:
            raise KeyError(self.validated_as)
        return float(nan_for_null(found["metrics"])[self.metric.removeprefix(f"{VALIDATION}_")])


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
