"""The figures of a run's stages, as the page shows them."""

import math
from dataclasses import dataclass
from typing import Any

from pipelines.runtime import storage

NOT_FIGURES = ("format_version", "stage", "identity", "rows", "loss_curve", "seconds_by_stage")


@dataclass
class StageOutput:
    """A finished stage's folder."""

    name: str  # of the folder
    path: str
    summary: dict[str, Any]

    @property
    def stage(self) -> str:
        return str(self.summary.get("stage", self.name))

    @property
    def images(self) -> int | None:
        """The number of images encoded or drawn; for training, the images seen."""
        return self.summary.get("images", self.summary.get("images_seen"))

    def file(self, name: str) -> str | None:
        path = storage.join(self.path, name)
        return path if storage.exists(path) else None


def figures(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """All plain values of a summary, those of nested mappings as `name · key`."""
    found: list[tuple[str, Any]] = []
    for name, value in summary.items():
        if name in NOT_FIGURES:
            continue
        if isinstance(value, dict):
            found += [(f"{name} · {key}", one) for key, one in figures(value)]
        else:
            found.append((name, ", ".join(number(one) for one in value) if isinstance(value, list) else value))
    return found


def key_figures(run: dict[str, Any], stages: list[StageOutput]) -> list[dict[str, str]]:
    """The main figures at the top of the page."""
    known = {name: value for one in stages for name, value in one.summary.items()} | run
    trained = next((one.summary for one in stages if one.stage == "train"), {})
    tiles = []

    def tile(label: str, text: str, note: str = "") -> None:
        tiles.append({"label": label, "text": text, "note": note})

    if (agreement := known.get("label_agreement")) is not None:
        real = known.get("classifier_accuracy_real", known.get("accuracy_held_out"))
        count = f"{number(known['images_held_out'])} " if "images_held_out" in known else ""
        note = f"{count}real images {100 * real:.1f}\u00a0%" if real is not None else ""
        tile("label agreement", f"{100 * agreement:.1f}\u00a0%", note)
    rows = distances(run, stages)
    for row in [row for row in rows if row["name"] == "generated"] or rows[:1]:
        tile("Fréchet distance", number(row["distance"]), row["name"].replace("_", " "))
    if known.get("psnr_held_out") is not None:
        tile("reconstruction", f"{known['psnr_held_out']:.1f} dB", f"PSNR, {measured_on(known)}")
    if "loss" in trained:
        tile("training loss", number(trained["loss"]), f"{number(trained['images_seen'])} images seen")
    if "images_per_second" in trained:
        tile("training speed", f"{number(trained['images_per_second'])}/s", f"images, {trained.get('workers', 1)} workers")
    if "samples" in run:
        tile("samples", number(run["samples"]), "drawn and evaluated")
    if "seconds" in run:
        tile("whole run", duration(run["seconds"]), "with a resume" if run.get("resumed") else "without interruption")
    if "peak_memory_gb" in run:
        tile("peak memory", f"{run['peak_memory_gb']:.1f} GB", "all processes")
    return tiles


def distances(run: dict[str, Any], stages: list[StageOutput]) -> list[dict[str, Any]]:
    """Rows {name, distance, share of the largest} of the Fréchet table: the run's comparison, or else each evaluation's distance."""
    rows: dict[str, float] = {}
    if isinstance(compared := run.get("frechet_distance"), dict):
        rows = {name: value for name, value in compared.items() if isinstance(value, int | float)}
    for one in stages:
        if one.stage == "evaluate" and not rows:
            rows = {name: value for name, value in one.summary.items() if name == "fid" or name.startswith("frechet_distance_")}
    largest = max(rows.values(), default=0.0)
    return [{"name": name, "distance": value, "share": 100 * value / largest if largest > 0 else 0} for name, value in rows.items()]


def times(run: dict[str, Any], stages: list[StageOutput]) -> list[dict[str, Any]]:
    """One row {name, seconds, share of the longest, images, images_per_second, tflops (per worker), mfu} per stage."""
    rows = [
        {
            "name": one.name,
            "seconds": one.summary["seconds"],
            "images": one.images,
            "images_per_second": one.summary.get("images_per_second"),
            "tflops": one.summary.get("tflops_per_worker", one.summary.get("tflops_per_actor")),
            "mfu": one.summary.get("mfu"),
        }
        for one in stages
        if one.summary.get("seconds") is not None
    ]
    longest = max((row["seconds"] for row in rows), default=0)
    return [{**row, "share": 100 * row["seconds"] / longest if longest else 0} for row in rows]


def number(value: Any) -> str:
    """Format with thousands separators and four significant digits; "none" for a number that is missing or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 05 s, 42 s, 0.8 s."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def measured_on(tokenized: dict[str, Any]) -> str:
    """The images of `psnr_held_out`; summaries of earlier versions do not have their number."""
    return f"{number(tokenized['psnr_images'])} held-out images" if "psnr_images" in tokenized else "held-out images"
