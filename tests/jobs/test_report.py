"""The report of a run: every figure is on the page, the pictures are inside it, nothing is fetched from elsewhere."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.report.figures import StageOutput, duration, number, times
from jobs.report.page import classes_drawn, report
from pipelines.runtime.errors import UserError
from pipelines.runtime.plots import sweep_plot


def write(folder: Path, summary: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"format_version": 1, **summary}))


def picture(path: Path, shade: int) -> None:
    Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "runs" / "tiny"
    write(
        root / "tokenizer",
        {"stage": "tokenize", "seconds": 61.25, "images": 80_000, "images_per_second": 1306.0,
         "psnr_held_out": 23.917, "loss_curve": [[1, 0.5], [2, 0.25]]},
    )  # fmt: skip
    picture(root / "tokenizer" / "pairs.png", 10)
    write(root / "cache", {"stage": "cache", "seconds": 13.46, "images": 4500, "images_per_second": 334.7, "rejected": 3})
    (root / "cache" / "manifest.json").write_text(json.dumps({"class_names": ["ant", "<bee>"]}))
    rows = [
        {"images_seen": 25_600 * seen, "loss": 1 / seen, **{f"loss_band_{band}": 1 / seen + band for band in range(4)},
         "gradient_norm": 1.0, "learning_rate": 1e-3, "images_per_second": 600.0, "data_wait_share": 0.01}
        for seen in range(1, 6)
    ]  # fmt: skip
    write(
        root / "train",
        {
            "stage": "train",
            "seconds": 140.0,
            "images_seen": 128_000,
            "loss": 0.43765,
            "images_per_second": 647.75,
            "parameters": 4_123_456,
            "workers": 2,
        },
    )
    (root / "train" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(root / "classifier", {"stage": "classifier", "seconds": 12.0, "accuracy_held_out": 0.984})
    trials = [
        {
            "trial": f"temperature={value}",
            "parameters": {"generate.temperature": value},
            "metric": metrics.get("frechet_distance_x"),
            "metrics": metrics,
            "seconds": 14.0,
            "error": None if metrics else "ValueError: <too hot>",
        }
        for value, metrics in (
            (0.9, {"frechet_distance_x": 61.25, "label_agreement": 0.875}),
            (1.0, {"frechet_distance_x": 55.125}),
            (9.0, {}),
        )
    ]
    best = {key: trials[1][key] for key in ("trial", "parameters", "metric")}
    write(
        root / "sweep",
        {
            "stage": "sweep-generate",
            "seconds": 52.0,
            "over": "generate",
            "metric": "frechet_distance_x",
            "mode": "min",
            "failed": 1,
            "rows": trials,
            "best": best,
        },
    )
    (root / "sweep" / "sweep.png").write_bytes(sweep_plot(trials, "frechet_distance_x", "temperature=1.0"))
    write(root / "evaluation", {"stage": "evaluate", "seconds": 49.0, "images": 1000, "label_agreement": 0.936})
    picture(root / "evaluation" / "samples.png", 200)
    configuration = {"seed": 7, "train": {"batch": 128, "learning_rate": 0.001}, "tracking": {"uri": "http://me:hunter2@mlflow.local:5000"}}
    (root / "configuration.json").write_text(json.dumps(configuration))
    write(
        root,
        {"stage": "quickstart", "seconds": 318.4, "peak_memory_gb": 5.43, "samples": 1000, "label_agreement": 0.936,
         "classifier_accuracy_real": 0.984,
         "frechet_distance": {"generated": 54.8125, "real_train": 18.25, "noise": 402.75}, "sampling": {"temperature": 1.0},
         "resumed": False,
         "seconds_by_stage": {"train": 140.0}},
    )  # fmt: skip
    return root


class Page(HTMLParser):
    """The visible text, and the value of every attribute that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.fetched, self.tags = "", [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_figure_is_on_the_page_and_nothing_is_fetched(run: Path) -> None:
    assert report(f"{run}/") == str(run / "report.html")
    source = (run / "report.html").read_text()
    page = Page(source)
    for shown in (
        "93.6\u00a0%", "98.4\u00a0%", "23.9 dB", "23.92 dB", "0.4376", "647.8", "128,000", "4,123,456", "5 min 18 s",
        "5.4 GB",  # tiles
        "54.81", "18.25", "402.8", "generated", "real train", "noise",  # Fréchet rows
        "1 min 01 s", "13 s", "2 min 20 s", "80,000", "4,500", "334.7", "1,306",  # times
        "temperature=0.9", "61.25", "0.875", "55.12", "ValueError: <too hot>", "1 failed", "lowest Fréchet distance x",  # sweep
        "ant · <bee>", "rejected", "5.43",  # classes, all figures
        "learning rate", "0.001", "seed",  # configuration
        f"mar quickstart --config {run}/configuration.json", f"mar report {run}", "http://mlflow.local:5000",
    ):  # fmt: skip
        assert shown in page.text, shown
    assert "hunter2" not in source
    assert "script" not in page.tags
    assert page.fetched
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched)
    assert "url(" not in source
    assert "@import" not in source
    assert re.search(r'<tr class="best"><th scope="row">temperature=1.0</th>', source)


def test_pictures_are_inside_the_page_and_beside_it(run: Path) -> None:
    report(str(run))
    fetched = Page((run / "report.html").read_text()).fetched
    inside = {base64.b64decode(value.partition(",")[2]) for value in fetched}
    beside = {path.stem: path.read_bytes() for path in (run / "report").iterdir()}
    assert sorted(beside) == ["reconstructions", "samples", "sweep", "tokenizer", "training", "training-panels"]
    assert inside == set(beside.values())
    assert (run / "samples.png").read_bytes() == (run / "evaluation" / "samples.png").read_bytes() == beside["samples"]
    assert all(Image.open(io.BytesIO(data)).format == "PNG" for data in inside)


def test_missing_parts_are_left_out(run: Path) -> None:
    alone = run.parent / "alone"
    write(alone / "train", {"stage": "train", "seconds": 1.0, "images_seen": 5, "loss": 0.5})
    text = Page(Path(report(str(alone))).read_text()).text
    assert "Training" in text
    assert not [part for part in ("Samples", "Tokenizer", "Sweeps", "Configuration", "Fréchet") if part in text]
    assert "Training" in Page(Path(report(str(alone / "train"))).read_text()).text  # the folder of one stage


def test_a_training_that_diverged_shows_no_loss_and_says_so(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    nothing = {name: None for name in lines[0] if name.startswith("loss") or name == "gradient_norm"}
    text = "".join(json.dumps({**line, **(nothing if number else {})}) + "\n" for number, line in enumerate(lines))
    (run / "train" / "metrics.jsonl").write_text(text)
    summary = json.loads((run / "train" / "summary.json").read_text())
    (run / "train" / "summary.json").write_text(json.dumps({**summary, "loss": None, "steps": 1000, "steps_skipped": 800}))
    page = Page(Path(report(str(run))).read_text()).text
    assert re.search(r"training loss\s*none", page)
    assert "training diverged: no loss of its last interval is finite; 800 of 1,000 steps (80.0%) were skipped" in page
    assert "0.4376" not in page
    (run / "train" / "metrics.jsonl").write_text(text.splitlines()[-1] + "\n")
    report(str(run))  # with no point to draw


def test_numbers_of_few_images_are_marked_on_the_page(run: Path) -> None:
    def change(folder: Path, **more: Any) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, **more}))

    assert 'class="caution"' not in Path(report(str(run))).read_text()
    change(run / "evaluation", features="efficientnet-lite0", images=40, reference_images=5000)
    change(run / "sweep", caution="warning: 20 samples are far too few")
    change(run / "tokenizer", psnr_images=7)
    change(run / "classifier", images_held_out=50)
    change(run, frechet_images=500)
    text = Page(Path(report(str(run))).read_text()).text
    for shown in (
        "warning: 40 samples are far too few: below 300 images most of a Fréchet distance",
        "caution: the label agreement of 40 samples has a standard error of up to 8 percentage points.",
        "caution: 500 images in each row of the comparison are fewer than the 1,280 features",
        "warning: 20 samples are far too few.", "PSNR, 7 held-out images", "dB on 7 held-out images", "50 real images 98.4\u00a0%",
    ):  # fmt: skip
        assert shown in text, shown


def test_a_folder_without_a_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "not there"):
        with pytest.raises(UserError, match=r"holds no finished stage.*mar report runs/demo"):
            report(str(path))


def test_numbers_and_durations_for_reading() -> None:
    assert [number(one) for one in (True, 1234567, 0.000123456, 12.3456, 1234.5, "text", None, math.nan)] == [
        "yes",
        "1,234,567",
        "0.0001235",
        "12.35",
        "1,234",
        "text",
        "none",
        "none",
    ]
    assert [duration(one) for one in (0.84, 9.96, 42.4, 59.7, 60, 3725, 86_400)] == [
        "0.8 s",
        "10.0 s",
        "42 s",
        "60 s",
        "1 min 00 s",
        "1 h 02 min",
        "24 h 00 min",
    ]


def test_samples_are_counted_by_what_was_drawn_and_not_by_what_the_model_has_seen() -> None:
    drawn = StageOutput("samples", "samples", {"stage": "generate", "seconds": 2.0, "images": 2, "images_seen": 96, "identity": {}})
    trained = StageOutput("train", "train", {"stage": "train", "seconds": 3.0, "images_seen": 96})
    assert [row["images"] for row in times({}, [drawn, trained])] == [2, 96]
    assert classes_drawn(drawn, ["ant", "bee", "cat"]) == ["ant", "bee"]
