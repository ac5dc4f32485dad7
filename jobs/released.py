"""The commands `mar import` and `mar export`, which convert checkpoints of the public release (LTH14/mar)."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from jobs.path_options import path_given
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError


class Format(StrEnum):
    """The formats that a checkpoint can be exported to."""

    RELEASED = "released"


def import_command(
    file: Annotated[str, typer.Argument(metavar="FILE", callback=path_given, help="checkpoint-last.pth, its folder, or kl16.ckpt")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", callback=path_given, help="the directory to create")],
    ema: Annotated[bool, typer.Option("--ema/--raw", help="weights to sample with: the moving average, or the raw weights")] = True,
    tokenizer: Annotated[str, typer.Option(metavar="DIR", callback=path_given, help="its tokenizer; else the first it is used with")] = "",
    latent_scale: Annotated[float, typer.Option(metavar="X", help="factor that latents were multiplied by")] = 0.2325,
    heads: Annotated[str, typer.Option(metavar="N[,M]", help="attention heads of encoder and decoder")] = "",
    patch_size: Annotated[int | None, typer.Option(metavar="N", help="latents per token side", show_default=False)] = None,
    stride: Annotated[int | None, typer.Option(metavar="N", help="pixels per latent side", show_default=False)] = None,
) -> None:
    """Convert a released checkpoint to a checkpoint directory."""
    from jobs.stages import guarded

    def work() -> dict[str, Any]:
        from pipelines.checkpoints.released import ImportOptions, import_released

        encoder, decoder = _heads(heads)
        for name, value in {"--patch-size": patch_size, "--stride": stride, "--latent-scale": latent_scale}.items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}, expected a number above 0")
        return import_released(file, out, ImportOptions(ema, tokenizer, latent_scale, encoder, decoder, patch_size, stride))

    _show(guarded("import", _beside(out), work))


def export_command(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", callback=path_given, help="a checkpoint directory")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", callback=path_given, help="the folder to write checkpoint-last.pth to")],
    format: Annotated[Format, typer.Option("--format", help="format to write")] = Format.RELEASED,
) -> None:
    """Convert a checkpoint directory to a file of the release."""
    from jobs.stages import guarded

    def work() -> dict[str, Any]:
        from pipelines.checkpoints.released import export_released

        return export_released(checkpoint, out)

    _show(guarded("export", _beside(out), work))


def _heads(text: str) -> tuple[int | None, int | None]:
    """`12` or `12,16`: heads of encoder and decoder."""
    parts = text.split(",") if text else []
    if len(parts) > 2 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise UserError(f"--heads is {text!r}, expected one whole number above 0, or two, e.g. 12,16")
    return (int(parts[0]), int(parts[-1])) if parts else (None, None)


def _beside(out: str) -> str:
    """The directory for the traceback of a failure: the parent of the output, which does not exist then."""
    return storage.parent(out)


def _show(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        print(f"{name.replace('_', ' ')}: {value}")
