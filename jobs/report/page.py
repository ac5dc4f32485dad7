"""One self-contained page about a run: samples, quality, cost, and how to repeat it."""

import base64
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from jobs.report.figures import StageOutput, distances, duration, figures, key_figures, measured_on, number, times
from jobs.report.metrics import metrics
from jobs.report.reading import Classes, Reading, ReportedSummary
from pipelines.images.grid import GRID_CLASSES
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.plots import loss_curve, training_curves, training_panels
from pipelines.runtime.progress import console
from pipelines.runtime.stage import Configuration
from pipelines.runtime.tracking import without_password
from pipelines.training.metrics.divergence import diverged, skipped_steps

TEMPLATE = Path(__file__).with_name("report.html.j2")
ORDER = ("tokenize", "cache", "train", "classifier", "sweep", "generate", "evaluate")  # order of the stages on the page


@dataclass
class Pictures:
    """Collects the page's pictures: each is written to `folder` as PNG and embedded in the page."""

    folder: str

    def add(self, name: str, data: bytes) -> str:
        """The picture as a `data:` URI."""
        storage.write_bytes(storage.join(self.folder, f"{name}.png"), data)
        return "data:image/png;base64," + base64.b64encode(data).decode()

    def copy(self, name: str, data: bytes | None) -> str | None:
        return self.add(name, data) if data else None


def report(path: str, run_summary: dict[str, Any] | None = None) -> str:
    """Write `path/report.html` and its pictures to `path/report/`; returns the page's path.

    `path` is a run's directory with one directory per stage, or the directory of one stage. Missing and damaged parts are left out;
    damaged files are listed on the page and in the terminal. `run_summary` replaces the run's `summary.json`, which is written last.
    Raises UserError if there is no finished stage.
    """
    from jinja2 import Environment

    from pipelines.evaluation import cautions  # imports torch

    path = path.rstrip("/")
    reading = Reading()
    stages = find_stages(path, reading)
    if not stages:
        raise UserError(
            "".join(f"{problem}\n" for problem in reading.problems)
            + f"{path!r} holds no finished stage: expected directories with a summary.json, as `mar quickstart` or `mar train` write "
            "them",
            remedy="give the run's directory, e.g. `mar report runs/demo`",
        )
    summary = run_summary or reading.object(storage.join(path, "summary.json"), ReportedSummary)
    run = summary if summary.get("stage") not in [one.stage for one in stages] else {}
    configuration = reading.object(storage.join(path, "configuration.json"), Configuration)
    if "uri" in (configuration.get("tracking") or {}):
        configuration["tracking"]["uri"] = without_password(configuration["tracking"]["uri"])
    pictures = Pictures(storage.join(path, "report"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number,
        "duration": duration,
        "words": lambda name: str(name).replace("_", " ").replace("frechet", "Fréchet"),
    }
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=path.rpartition("/")[2],
        path=path,
        tiles=key_figures(run, stages),
        cautions=cautions.of_run(run, [one.summary for one in stages if one.stage == "evaluate"]),
        samples=_samples(path, stages, pictures, run, reading),
        distances=distances(run, stages),
        metrics=metrics([one.summary for one in stages if one.stage == "evaluate"]),
        training=_training(stages, pictures, reading),
        tokenizer=_tokenizer(stages, pictures, reading),
        sweeps=_sweeps(stages, pictures, reading),
        times=times(run, stages),
        figures=[("whole run", figures(run))] * bool(run) + [(one.name, figures(one.summary)) for one in stages],
        configuration=_configuration(configuration, stages),
        commands=_commands(path, configuration, run),
        problems=reading.problems,
    )
    target = storage.join(path, "report.html")
    storage.write_bytes(target, page.encode())
    for problem in reading.problems:
        console().print(f"report: left out: {problem}", markup=False, soft_wrap=True)
    return target


def find_stages(path: str, reading: Reading) -> list[StageOutput]:
    """The finished stages in `path` and its directories, in the order of ORDER."""
    found = []
    for name in ["", *storage.list_directory(path)] if storage.is_directory(path) else []:
        folder = storage.join(path, name) if name else path
        summary = reading.object(storage.join(folder, "summary.json"), ReportedSummary)
        if summary and (name or summary.get("stage") in ORDER):
            found.append(StageOutput(name or path.rpartition("/")[2], folder, summary))
    return sorted(found, key=lambda one: (ORDER.index(one.stage) if one.stage in ORDER else len(ORDER), one.name))


def _samples(path: str, stages: list[StageOutput], pictures: Pictures, run: dict[str, Any], reading: Reading) -> dict[str, Any] | None:
    """The grid of the evaluation, or else of the generation; also copied to `path/samples.png`."""
    for one in sorted(stages, key=lambda one: one.stage != "evaluate"):
        data = reading.picture(one.file("samples.png")) if one.stage in ("evaluate", "generate") else None
        if data:
            if one.path != path:
                storage.write_bytes(storage.join(path, "samples.png"), data)
            cached = next((other.path for other in stages if other.stage == "cache"), one.path)
            manifest = reading.object(storage.join(cached, "manifest.json"), Classes)
            names = classes_drawn(one, manifest.get("class_names", []))
            return {
                "picture": pictures.add("samples", data),
                "classes": names if len(names) <= GRID_CLASSES else [],  # up to this number the grid has one row per class
                "sampling": run.get("sampling", {}),
            }
    return None


def classes_drawn(one: StageOutput, names: list[str]) -> list[str]:
    """The classes that a generation or an evaluation drew, in order; empty if they are unknown."""
    chosen = one.summary.get("identity", {}) if one.stage == "generate" else {}
    labels = [names.index(label) if label in names else label for label in chosen.get("generate.labels") or range(len(names))]
    numbers = chosen.get("generate.samples") or range(one.images or 0)
    drawn = {labels[number % len(labels)] for number in numbers if labels}
    return [names[label] for label in sorted(drawn)] if drawn <= set(range(len(names))) else []


def _training(stages: list[StageOutput], pictures: Pictures, reading: Reading) -> dict[str, Any] | None:
    for one in stages:
        if one.stage == "train":
            rows = reading.metrics(one.file("metrics.jsonl"), one.images or 0)
            caution = (diverged(one.summary) if "loss" in one.summary else "") or skipped_steps(one.summary)
            curves = (
                (pictures.add("training", training_curves(rows)), pictures.add("training-panels", training_panels(rows))) if rows else ()
            )
            return {"curves": curves, "summary": one.summary, "caution": caution}
    return None


def _tokenizer(stages: list[StageOutput], pictures: Pictures, reading: Reading) -> dict[str, Any] | None:
    for one in stages:
        if one.stage == "tokenize":
            points = [(seen, loss) for seen, loss in one.summary.get("loss_curve") or []]
            curve = pictures.add("tokenizer", loss_curve(points)) if len(points) > 1 else None
            pairs = pictures.copy("reconstructions", reading.picture(one.file("pairs.png")))
            about = {"pairs": pairs, "curve": curve, "summary": one.summary, "measured_on": measured_on(one.summary)}
            return about if pairs or curve else None
    return None


def _sweeps(stages: list[StageOutput], pictures: Pictures, reading: Reading) -> list[dict[str, Any]]:
    found = []
    for one in stages:
        rows = one.summary.get("rows")
        if one.stage.startswith("sweep") and rows and one.summary.get("best"):
            metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
            shown = [name for name in metrics if name.startswith(("loss", "fid", "frechet_distance_", "inception", "label_agreement"))]
            found.append(
                {
                    "name": one.name,
                    "summary": one.summary,
                    "rows": rows,
                    "metrics": [name for name in shown if not name.startswith("loss_band")],
                    "plot": pictures.copy(one.name, reading.picture(one.file("sweep.png"))),
                }
            )
    return found


def _configuration(configuration: dict[str, Any], stages: list[StageOutput]) -> dict[str, dict[str, Any]]:
    """{section: {key: value}}; without a run's configuration, the identities in the summaries."""
    if configuration:
        top = {name: value for name, value in configuration.items() if not isinstance(value, dict)}
        return {**({"run": top} if top else {}), **{name: value for name, value in configuration.items() if isinstance(value, dict)}}
    return {one.name: one.summary["identity"] for one in stages if one.summary.get("identity")}


def _commands(path: str, configuration: dict[str, Any], run: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows (description, command line)."""
    if not configuration:
        return [("this page", f"mar report {quote(path)}")]
    file = quote(storage.join(path, "configuration.json"))
    commands = (
        [("the whole run, in an empty directory", f"mar quickstart --config {file}")]
        if run.get("stage", "quickstart") == "quickstart"
        else []
    )
    commands += [("one stage", f"mar train --config {file}"), ("this page", f"mar report {quote(path)}")]
    if uri := (configuration.get("tracking") or {}).get("uri"):
        command = uri if uri.startswith("http") else f"mlflow ui --host 127.0.0.1 --backend-store-uri {quote(uri)}"
        commands.append(("all metrics in MLflow", command))
    return commands
