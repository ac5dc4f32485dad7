"""Import and export of checkpoints of the public release (LTH14/mar). Files are written atomically; stages accept a released `.pth`."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mar_model.checkpoints.checkpoint import STATE
from mar_model.checkpoints.first_stages import import_tokenizer
from mar_model.checkpoints.released import LATENT_SCALE, export_checkpoint, import_checkpoint, is_scaled_as_released
from mar_model.checkpoints.released_file import FILE, ReleasedFile
from mar_model.tokenizers import load_tokenizer, network_config
from mar_model.version import __version__
from pipelines.checkpoints.directory import ANOTHER_CHECKPOINT, CheckpointState, newest_checkpoint
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.tokenizing.directory import tokenizer_config, tokenizer_digest

CONFIG = "config.json"  # in a tokenizer directory
SOURCE = "source.json"  # in an imported directory: the imported file and the options
IMPORTED = ".imported"  # suffix of the directory for a `.pth` that is passed as a checkpoint


@dataclass(frozen=True)
class ImportOptions:
    """Properties that a released MAR checkpoint does not contain; None: derived from its shapes, its arguments and the published sizes."""

    ema: bool = True  # generate with the averaged weights (raw weights are imported too), or import only the raw weights
    tokenizer: str = ""  # directory of its tokenizer; empty: the tokenizer of the first use
    latent_scale: float = LATENT_SCALE  # 1 / standard deviation of the latents in its training
    encoder_heads: int | None = None
    decoder_heads: int | None = None
    patch_size: int | None = None
    stride: int | None = None


def import_released(file: str, out: str, options: ImportOptions | None = None, renew: bool = False) -> dict[str, Any]:
    """Convert a released `checkpoint-last.pth` (or its folder) to a checkpoint directory at `out`, or a `kl16.ckpt` to a tokenizer
    directory; the parameter names decide which. Returns a summary. An `out` imported from the same file is kept; with `renew`, an `out`
    imported from another file is replaced.

    Raises UserError for a file that does not fit, and for an `out` with other content; nothing is written then.
    """
    options = options or ImportOptions()
    path = Path(storage.filesystem(file)[1])
    if not storage.is_local(file) or not path.exists():
        raise UserError(
            f"{file} does not exist; expected a local {FILE} or kl16.ckpt", remedy="copy a file in a bucket to a local disk first"
        )
    path = path / FILE if path.is_dir() else path
    try:
        of_tokenizer = ReleasedFile(path).is_tokenizer
        if of_tokenizer and options != ImportOptions():
            raise UserError(f"{file} contains a tokenizer", remedy="leave out --raw and the size options, which are for MAR checkpoints")
        stat = path.stat()
        made_of = {"file": path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, **asdict(options)}
        existing = _made_of(out)
        if existing == made_of:
            return {"complete": out, **made_of}
        occupied = storage.exists(out) and (not storage.is_directory(out) or storage.list_directory(out))
        if occupied and not (renew and existing):
            raise UserError(
                f"{out} exists, but was not imported from this {path.name} with these options", remedy="choose another --out, or delete it"
            )
        with _scratch(out) as temporary:
            directory = Path(temporary) / "imported"
            summary = _tokenizer(path, directory) if of_tokenizer else _checkpoint(path, directory, options)
            (directory / SOURCE).write_text(json.dumps(made_of, indent=2) + "\n", encoding="utf-8")
            if _made_of(out) != made_of:  # else another process has written it
                storage.publish_directory(directory, out, last=CONFIG if of_tokenizer else STATE)
    except ValueError as error:
        raise UserError(str(error)) from error
    return {"tokenizer" if of_tokenizer else "checkpoint": out, **summary}


def _tokenizer(path: Path, directory: Path) -> dict[str, Any]:
    config = import_tokenizer(path, directory)
    return {"latent_channels": config.channels, "stride": config.stride, "digest": tokenizer_digest(str(directory))}


def _checkpoint(path: Path, directory: Path, options: ImportOptions) -> dict[str, Any]:
    chosen = {name: getattr(options, name) for name in ("encoder_heads", "decoder_heads", "patch_size", "stride")}
    named: dict[str, str | None] = {"path": "", "digest": None}
    if options.tokenizer:
        if not storage.exists(storage.join(options.tokenizer, CONFIG)):
            raise UserError(f"{options.tokenizer} is not a tokenizer directory: {CONFIG} is missing")
        named = {"path": options.tokenizer, "digest": tokenizer_digest(options.tokenizer)}
        tokenizer = load_tokenizer(storage.local_directory(options.tokenizer))
        chosen |= {"latent_channels": tokenizer.channels, "stride": tokenizer.stride}
    state = {"code_version": __version__, "class_names": [], "tokenizer": named}
    config = import_checkpoint(path, directory, state, ema=options.ema, latent_scale=options.latent_scale, **chosen)
    shown = (
        "encoder_depth", "encoder_width", "encoder_heads", "decoder_depth", "decoder_width", "decoder_heads", "denoiser_depth",
        "denoiser_width", "latent_size", "latent_channels", "patch_size", "classes",
    )  # fmt: skip
    return {name: getattr(config, name) for name in shown}


def _made_of(out: str) -> Any:
    source = storage.join(out, SOURCE)
    return storage.read_json(source, dict[str, Any], f"choose another path, or delete {out}") if storage.exists(source) else None


def _scratch(out: str) -> AbstractContextManager[str]:
    """A temporary folder, on the same disk as a local `out`, so that a rename publishes its content.

    Raises UnwritableError."""
    parent = Path(storage.filesystem(out)[1]).parent if storage.is_local(out) else None
    with storage.writing(out):
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=parent, prefix=".writing-")


def export_released(checkpoint: str, out: str) -> dict[str, Any]:
    """Write `out/checkpoint-last.pth`, for the release's `--resume out`, with the raw and averaged weights of a checkpoint directory.

    Raises UserError for a damaged checkpoint, and if the file already exists.
    """
    target = storage.join(out, FILE)
    if storage.exists(target):
        raise UserError(f"{target} already exists", remedy="choose another --out, or delete it")
    with _scratch(target) as temporary:
        written = Path(temporary) / "exported" / FILE
        written.parent.mkdir()
        try:
            export_checkpoint(storage.local_directory(checkpoint), written)
        except ValueError as error:
            raise UserError(f"{checkpoint}: {error}; expected a checkpoint directory") from error
        size = written.stat().st_size
        state = storage.read_json(storage.join(checkpoint, STATE), CheckpointState, ANOTHER_CHECKPOINT)
        if storage.is_local(target):
            os.replace(written, storage.filesystem(target)[1])
        else:
            storage.write_bytes(target, written.read_bytes())
    summary: dict[str, Any] = {"file": target, "bytes": size}
    if not is_scaled_as_released(state):
        summary["latents"] = (
            f"this model's latents are (x − mean) / std with latent_mean and latent_std in {STATE}, but the release's code multiplies by "
            f"{LATENT_SCALE}: change its main_mar.py and engine_mar.py, else it trains and generates at another scale"
        )
    return summary


def checkpoint_directory(named: str) -> str:
    """The checkpoint directory for a path given as a checkpoint: the path itself, or for a released `.pth` its import next to the file,
    which is repeated when the file has changed.

    Raises UserError as `import_released` does.
    """
    if not named.endswith(".pth"):
        return named
    import_released(named, named + IMPORTED, renew=True)
    return named + IMPORTED


def chosen_checkpoint(checkpoint: str, train_path: str, say: Callable[[str], None]) -> str:
    """The directory of `generate.checkpoint` (a directory, or a released `.pth`); if it is empty, the newest checkpoint in `train_path`.
    `say` prints a line for each newer checkpoint that is damaged. Raises UserError if there is none."""
    found = checkpoint_directory(checkpoint) or newest_checkpoint(train_path, say)
    if found is None:
        raise UserError(f"train.path {train_path!r} contains no checkpoint", "run `mar train`, or set generate.checkpoint")
    return found


def with_tokenizer(state: dict[str, Any], path: str) -> dict[str, Any]:
    """The state of a checkpoint that is used with the tokenizer at `path`; a checkpoint imported without a tokenizer adopts this one.

    Raises UserError if the number of latent channels differs.
    """
    if state["tokenizer"]["digest"] is not None:
        return state
    config = network_config(tokenizer_config(path))
    channels, expected = config.channels if config else 3, state["model"]["latent_channels"]
    if channels != expected:
        raise UserError(
            f"tokenizer.path {path!r} has {channels} latent channels, expected {expected} as in the checkpoint's model",
            remedy="set tokenizer.path to its tokenizer",
        )
    return {**state, "tokenizer": {"path": path, "digest": tokenizer_digest(path)}}
