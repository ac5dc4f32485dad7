"""The whole journey on a few digits, killed with -9 on its way, started again, and asked a third time; then its files are damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from damage import NEWEST, RUN, Copy, commands, kinds, mar, reference

from jobs.quickstart.digits import write_digits
from pipelines.runtime import progress
from pipelines.runtime.cluster.settings import ClusterSettings

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "tokenizer.images=1024", "tokenizer.width=8", "model.encoder_depth=1", "model.decoder_depth=1", "model.encoder_width=48",
    "model.decoder_width=48", "model.denoiser_depth=1", "model.denoiser_width=32", "train.images=2560", "train.checkpoint_images=512",
    "train.log_images=512", "train.schedule_images=2560", "train.warmup_images=256", "generate.diffusion_steps=4", "generate.ar_steps=2",
    "generate.batch=20", "evaluate.images=40", "sweep.images=20", "sweep.parameters={generate.temperature: [0.9, 1.0]}",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a part of the demo's digits: 150 a class, and 20 held out."""
    folder = Path(tmp_path_factory.mktemp("journey"))
    digits = folder / "runs" / "demo" / "digits"
    write_digits(str(digits))
    for file in [*digits.glob("train/*/*.png"), *digits.glob("held_out/*/*.png")]:  # numbered from 50, and from 0
        if int(file.stem) >= 200 or 20 <= int(file.stem) < 50:
            file.unlink()
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "preforked", str(folder / f"workers-{time.monotonic_ns()}"), "jobs.cli", "quickstart"]
    for setting in SETTINGS:
        command += ["--set", setting]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    log = (folder / "output.log").open("a")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def output(folder: Path) -> str:
    return (folder / "output.log").read_text()


def wait_for(path: Path, process: subprocess.Popen[str], folder: Path, seconds: float = 600) -> None:
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
    assert second.wait(timeout=900) == 0, output(folder)
    said = output(folder)
    assert "Traceback" not in said
    assert "tokenizer is complete" in said  # the second attempt went on where the first one was killed
    assert "cache is complete" in said

    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed"] is True
    assert summary["samples"] == 40
    assert list(summary["frechet_distance"]) == ["real_train", "reconstructed", "generated", "noise"]
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
    assert third.wait(timeout=300) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    for stage in ("tokenize", "cache", "train", "evaluate"):
        assert f"{stage} is complete" in output(folder)


REFUSED, FOUND, DONE = 2, 1, 0  # a stage does not begin; a check names it among what it has found; it is left out, or made again
CASES: list[tuple[str, int, list[str]]] = [  # the command, how it ends, and the files that are damaged for it, all at once
    ("report", DONE, ["tokenizer/pairs.png", "train/metrics.jsonl", "evaluation/samples.png", "sweep/sweep.png", "configuration.json",
                      "summary.json", "classifier/summary.json", "sweep-width/summary.json"]),
    ("report", DONE, ["cache/manifest.json"]),
    ("report", REFUSED, [f"{stage}/summary.json" for stage in
                         ("tokenizer", "cache", "train", "classifier", "sweep", "sweep-width", "evaluation")]),
    ("verify", REFUSED, ["cache/manifest.json"]),
    ("verify", FOUND, ["cache/listing.arrow", "cache/rejected.parquet", "cache/configuration.json", "cache/identity.json",
                       "cache/summary.json", "cache/shards/shard-00000.json"]),
    ("verify", FOUND, ["cache/shards/shard-00000.arrow"]),
    ("verify --sample", REFUSED, ["cache/configuration.json"]),
    ("inspect", REFUSED, ["cache/manifest.json"]),
    ("inspect", REFUSED, ["cache/rejected.parquet"]),
    ("inspect", REFUSED, ["cache/shards/shard-00000.arrow"]),
    ("inspect", REFUSED, ["cache/configuration.json"]),
    ("inspect", REFUSED, ["tokenizer/config.json"]),
    ("plan", REFUSED, ["cache/manifest.json"]),
    ("cache", DONE, ["cache/manifest.json", "cache/summary.json"]),
    ("cache", DONE, ["cache/listing.arrow"]),
    ("cache", DONE, ["cache/rejected.parquet"]),
    ("cache", DONE, ["cache/configuration.json", "cache/identity.json"]),
    ("cache", REFUSED, ["cache/identity.json", "cache/summary.json"]),
    ("cache", REFUSED, ["tokenizer/config.json"]),
    ("cache", REFUSED, ["tokenizer/tokenizer.safetensors"]),
    ("tokenize", REFUSED, ["tokenizer/config.json"]),
    ("tokenize", REFUSED, ["tokenizer/tokenizer.safetensors"]),
    ("tokenize", DONE, ["tokenizer/summary.json"]),
    ("train", REFUSED, ["cache/manifest.json"]),
    ("train", DONE, ["train/identity.json", "train/configuration.json"]),
    ("train anew", REFUSED, ["cache/manifest.json"]),
    ("train from", REFUSED, [f"{NEWEST}/state.json"]),
    ("train from", REFUSED, [f"{NEWEST}/ema.safetensors"]),
    *[("export", REFUSED, [f"{NEWEST}/{file}"]) for file in ("state.json", "model.safetensors", "ema.safetensors")],
    *[("generate", REFUSED, [f"{NEWEST}/{file}"]) for file in ("state.json", "ema.safetensors", "optimizer.safetensors")],
    ("generate", REFUSED, ["tokenizer/config.json"]),
    ("generate", REFUSED, ["tokenizer/tokenizer.safetensors"]),
    *[("evaluate", REFUSED, [file]) for file in ("classifier/config.json", "classifier/classifier.safetensors", "evaluation/reference")],
    ("evaluate", REFUSED, [f"{NEWEST}/state.json"]),
    ("sweep", DONE, ["sweep/summary.json"]),
    ("sweep", DONE, ["sweep/identity.json"]),
    ("doctor", FOUND, [f"{NEWEST}/state.json", "tokenizer/config.json", "classifier/config.json", "evaluation/reference"]),
    ("quickstart", DONE, ["summary.json", "attempts.json", "mlflow_run.json", "evaluation/identity.json", "classifier/identity.json",
                          "sweep-width/identity.json", "evaluation/rows/identity.json"]),
    ("quickstart", REFUSED, ["summary.json", "evaluation/evaluation.json"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def copy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Copy(tmp_path_factory.mktemp("copy") / "demo")


@pytest.fixture
def in_this_process(folder: Path, ray_local: ClusterSettings, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """Every command, to be run where the journey was made, on this module's Ray."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(progress, "_terminal", None)  # lines for the person go to sys.stderr, as without a Ray around
    return commands(SETTINGS)


@pytest.mark.parametrize("one", ["one", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{CASES[number][0]}-{Path(CASES[number][2][0]).name}")
def test_every_damaged_file_is_named_by_the_command_that_reads_it(
    number: int, one: str, copy: Copy, in_this_process: dict[str, tuple[str, ...]]
) -> None:
    """One kind of damage for each case, or all of them."""
    command, status, files = CASES[number]
    files = [reference() if file == "evaluation/reference" else file for file in files]
    for turn in range(7 if one == "all" else 1):
        chosen = {file: list(kinds(file))[(number + turn) % len(kinds(file))] for file in files}
        with copy.damaged({file: kinds(file)[kind] for file, kind in chosen.items()}):
            ended = mar(*in_this_process[command])
        about = f"{command}, {chosen}: {ended}"
        assert ended.status == status, about
        assert "Traceback" not in ended.text, about
        assert not [file for file in files if file.removeprefix("cache/shards/") not in ended.text], about


def test_a_damaged_database_of_mlflow_is_named(folder: Path, in_this_process: dict[str, tuple[str, ...]]) -> None:
    for kind, damage in kinds("mlflow.db").items():
        database = folder / "other" / f"{kind}.db"
        database.parent.mkdir(exist_ok=True)
        database.write_bytes(damage((RUN / "mlflow.db").read_bytes()))
        tracked = ("--set", f"tracking.uri=sqlite:///{database}")
        ended = mar(*in_this_process["train anew"], *tracked, "--set", f"train.path=other/{kind}")
        assert (ended.status, str(database) in ended.text, "Traceback" in ended.text) == (2, True, False), ended
        ended = mar(*in_this_process["doctor"], *tracked)
        assert (ended.status, f"✗ tracking.uri         sqlite:///{database}" in ended.text) == (1, True), ended
        assert database.is_file()  # somebody may still want to repair it
