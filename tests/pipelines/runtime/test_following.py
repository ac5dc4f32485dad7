"""Whoever follows a run in the terminal, in MLflow, through Prometheus or in its file sees the same numbers."""

import json
import re
import threading
import urllib.request
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray
from mlflow.tracking import MlflowClient
from tiny_cache import ARCHITECTURE, TOKENIZER, write_latents

from pipelines.runtime import progress
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import open_stage
from pipelines.runtime.tracking import TrackingSettings
from pipelines.training.settings import TrainSettings
from pipelines.training.stage import train

INTERVALS, EVERY = 5, 800
SETTINGS = TrainSettings(
    images=INTERVALS * EVERY, log_images=EVERY, batch=16, micro_batch=8, learning_rate=1e-3, warmup_images=32, workers=1,
    precision="float32", checkpoint_images=10**9, peak_tflops=0.1,
)  # fmt: skip
BANDS = tuple(f"loss_band_{band}" for band in range(4))
TOLD = ("loss", *BANDS, "gradient_norm", "images_per_second", "tflops_per_worker", "mfu")


class Scraper(threading.Thread):
    """Reads the page that Prometheus reads, again and again: values by metric."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        (node,) = ray.nodes()
        self.page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self.seen: dict[str, set[float]] = defaultdict(set)
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            with urllib.request.urlopen(self.page, timeout=10) as page:
                text = page.read().decode()
            for name, labels, value in re.findall(r"^ray_mar_train_(\w+)\{(.*?)\} (\S+)$", text, re.MULTILINE):
                band = re.search(r'band="(\d)"', labels)
                self.seen[f"{name}_{band[1]}" if band else name].add(float(value))


@pytest.mark.long
def test_everywhere_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "300")
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    settings = replace(SETTINGS, path=str(tmp_path / "train"))
    tracking = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db")
    cache = write_latents(tmp_path / "cache", rows=160)
    with open_stage("train", settings.path, {"train": asdict(settings)}, ClusterSettings(cpus=2), tracking) as stage:
        scraper = Scraper()
        scraper.start()
        train(TOKENIZER.path, cache, ARCHITECTURE, settings, stage)
        scraper.ended.set()
        scraper.join()
        run = stage.tracker.run_id
    rows = [json.loads(line) for line in Path(settings.path, "metrics.jsonl").read_text().splitlines()]
    assert [row["images_seen"] for row in rows] == list(range(EVERY, INTERVALS * EVERY + 1, EVERY))

    client = MlflowClient(tracking.uri)
    for name in rows[0].keys() - {"images_seen"}:
        history = [(one.step, one.value) for one in client.get_metric_history(run, name)]
        assert history[: len(rows)] == [(row["images_seen"], row[name]) for row in rows], name

    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: ") and " of 4,000 images" in line]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        rate = row["images_per_second"]
        assert f"train: {row['images_seen']:,} of 4,000 images" in line
        assert f", {rate:,.0f}/s" in line
        assert f"  loss {row['loss']:.4g}  mfu {row['mfu']:.4g}  data {row['data_wait_share']:.4g}" in line

    for name in TOLD:
        told = [row[name] for row in rows]
        assert all(any(value == pytest.approx(one, rel=1e-6) for one in told) for value in scraper.seen[name]), name
        assert len(scraper.seen[name]) >= 2, name
