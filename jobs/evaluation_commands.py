"""Commands and options about samples and references: `mar evaluate --samples`, `mar export --samples`, `mar reference`."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from jobs.command_options import ConfigOptions
from jobs.config.yaml_text import write_text
from jobs.path_options import path_given
from jobs.released import Format, export_command
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

SamplesGiven = Annotated[
    str, typer.Option("--samples", metavar="PATH", callback=path_given, help="evaluate these: folder, .npz, WebDataset, Parquet, shards")
]
RecordOut = Annotated[str, typer.Option("--out", metavar="DIR", callback=path_given, help="directory of the record: evaluate.path")]


class Split(StrEnum):
    """Parts of an image source."""

    ALL = "all"
    TRAIN = "train"
    HELD_OUT = "held_out"


def evaluate_assignments(samples: str, out: str) -> list[str]:
    """The options of `mar evaluate` as `section.key=value`."""
    given = {"evaluate.samples": samples, "evaluate.path": out}
    return [f"{name}={write_text(value)}" for name, value in given.items() if value]


def export(
    run: Annotated[str, typer.Argument(metavar="DIR", callback=path_given, help="a checkpoint directory; with --samples a run")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", callback=path_given, help="write checkpoint-last.pth to this folder")] = "",
    samples: Annotated[str, typer.Option("--samples", metavar="FILE.npz", callback=path_given, help="write the run's samples to it")] = "",
    format: Annotated[Format, typer.Option("--format", help="of a checkpoint")] = Format.RELEASED,
) -> None:
    """Convert a checkpoint or samples for other programs.

    A checkpoint becomes a file of the release; samples become the file that ADM's evaluation suite reads.
    """
    if bool(out) == bool(samples):
        found = "both --out and --samples are given" if out else "neither --out nor --samples is given"
        raise UserError(found, remedy="give --out FOLDER to export a checkpoint, --samples FILE.npz to export samples")
    if out:
        export_command(run, out, format)
        return
    from jobs.stages import guarded

    def work() -> dict[str, Any]:
        from pipelines.evaluation.image_sets.exporting import export_samples

        return export_samples(run, samples)

    _show(guarded("export", storage.parent(samples), work))


def reference_command(
    out: Annotated[str, typer.Option("--out", metavar="FILE.npz", callback=path_given, help="the file to write")],
    split: Annotated[Split, typer.Option("--split", help="part of images.source")] = Split.ALL,
    images: Annotated[int, typer.Option("--images", min=0, metavar="N", help="this many, chosen by the hash of their keys; 0: all")] = 0,
    *,
    given: ConfigOptions,
) -> None:
    """Compute reference statistics of an image source."""
    loaded = given.load()
    from jobs.stages import guarded

    def work() -> dict[str, Any]:
        from jobs.stages import sections_of
        from pipelines.evaluation.references.building import WORK, build_reference
        from pipelines.runtime.stage import open_stage

        located = loaded.located()
        work_path = out + WORK
        with open_stage("reference", work_path, loaded.recorded(), located.cluster, located.tracking, seed=located.seed) as stage:
            found = build_reference(out, sections_of(located).images, split.value, images, located.evaluate, stage)
        storage.delete(work_path)
        return found

    _show(guarded("reference", storage.parent(out), work))


def _show(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        print(f"{name.replace('_', ' ')}: {value}")
