"""The whole journey on a few digits, killed with -9 on its way, started again, and asked a third time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.digits import write_digits

SETTINGS = [
    "tokenizer.images=1024", "tokenizer.width=8", "model.encoder_depth=1", "model.decoder_depth=1", "model.encoder_width=48",
    "model.decoder_width=48", "model.denoiser_depth=1", "model.denoiser_width=32", "train.images=2560", "train.checkpoint_images=512",
    "train.log_images=512", "train.schedule_images=2560", "train.warmup_images=256", "generate.diffusion_steps=4", "generate.ar_steps=2",
    "generate.batch=20", "evaluate.images=40", "sweep.images=20", "sweep.parameters={generate.temperature: [0.9, 1.0]}",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a third of the demo's digits: 150 a class, and its 50 held out."""
    folder = Path(tmp_path_factory.mktemp("journey"))
    digits = folder / "runs" / "demo" / "digits"
    write_digits(str(digits))
    for file in digits.glob("train/*/*.png"):
        if int(file.stem) >= 200:
            file.unlink()
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.cli", "quickstart"]
    for setting in SETTINGS:
        command += ["--set", setting]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_ADDRESS", None)
    log = (folder / "output.log").open("a")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def output(folder: Path) -> str:
    return (folder / "output.log").read_text()


def wait_for(path: Path, process: subprocess.Popen[str], folder: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, output(folder)
        assert time.monotonic() < deadline, output(folder)
        time.sleep(0.05)


def test_killed_and_started_again_it_ends_whole(folder: Path) -> None:
    run = folder / "runs" / "demo"
    first = start(folder)
    wait_for(run / "train" / "checkpoints" / "images-000000000512" / "state.json", first, folder)
    started = psutil.Process(first.pid).children(recursive=True)
    next(one for one in started if "TrainController" in one.name()).suspend()  # it won't end by itself
    os.kill(first.pid, signal.SIGKILL)
    first.wait()

    second = start(folder)
    assert second.wait(timeout=400) == 0, output(folder)
    said = output(folder)
    assert "Traceback" not in said
    assert "tokenizer is complete" in said  # the second attempt went on where the first one was killed
    assert "cache is complete" in said

    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed"] is True
    assert summary["samples"] == 40
    assert set(summary["frechet_distance"]) == {"generated", "real_train", "noise"}
    assert summary["frechet_distance"]["noise"] > summary["frechet_distance"]["real_train"] > 0
    assert 0 <= summary["label_agreement"] <= 1
    assert summary["classifier_accuracy_real"] >= 0.95
    assert {"tokenize", "cache", "train", "sweep-generate", "sweep-train", "evaluate"} <= set(summary["seconds_by_stage"])
    assert summary["peak_memory_gb"] > 0.1
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (run / "report.html").read_text()
    rows = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [row["images_seen"] for row in rows] == list(range(512, 2561, 512))  # no interval twice, none missing

    _, alive = psutil.wait_procs(started, timeout=20)
    assert not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE], "left behind by the killed run"


def test_finished_it_says_so_and_does_nothing_again(folder: Path) -> None:
    run = folder / "runs" / "demo"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    third = start(folder)
    assert third.wait(timeout=120) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    for stage in ("tokenize", "cache", "train", "evaluate"):
        assert f"{stage} is complete" in output(folder)
