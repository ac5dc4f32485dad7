"""The stages as commands on a few small images, signals that they get, and what they leave."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from tiny_run import write_images

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "images.source": "images", "images.size": 32, "images.held_out_folder": "held_out", "tokenizer.images": 192, "tokenizer.batch": 16,
    "tokenizer.checkpoint_images": 64, "tokenizer.path": "tokenizer", "cache.path": "cache", "cache.shard_images": 8,
    "train.path": "train", "model.encoder_depth": 1, "model.decoder_depth": 1, "model.encoder_width": 32, "model.decoder_width": 32,
    "model.encoder_heads": 2, "model.decoder_heads": 2, "model.denoiser_depth": 1, "model.denoiser_width": 32, "train.images": 640,
    "train.batch": 16, "train.micro_batch": 8, "train.checkpoint_images": 64, "train.log_images": 64, "train.warmup_images": 32,
    "train.schedule_images": 640, "train.precision": "float32", "generate.path": "samples", "generate.images": 24, "generate.batch": 4,
    "generate.diffusion_steps": 4, "generate.ar_steps": 2, "generate.precision": "float32", "evaluate.path": "evaluation",
    "evaluate.images": 24, "evaluate.actors": 1, "sweep.path": "sweep", "sweep.images": 12,
    "sweep.parameters": "{generate.temperature: [0.9, 1.0]}", "tracking.uri": "sqlite:///mlflow.db",
}  # fmt: skip
STAGES = {  # in the order in which each reads what the others have made; the folder that it writes
    "tokenize": "tokenizer", "cache": "cache", "train": "train", "generate": "samples", "evaluate": "evaluation", "sweep": "sweep",
    "quickstart": ".",
}  # fmt: skip


def prepare(folder: Path, before: str = "", made_in: Path | None = None) -> None:
    """Write the images; or copy them from the folder `made_in`, and what the stages there have made that come before the stage `before`."""
    if made_in is None:
        write_images(folder / "images")
        return
    earlier = [path for stage, path in STAGES.items() if list(STAGES).index(stage) < list(STAGES).index(before)]
    for path in ("images", *(earlier if before != "quickstart" else [])):
        shutil.copytree(made_in / path, folder / path)


class Command:
    """`mar STAGE` in `folder`, running; `err` is what it has printed to stderr so far."""

    def __init__(self, stage: str, folder: Path, **settings: Any) -> None:
        self._err = folder / f"{stage}-{time.monotonic_ns()}.err"
        words = [word for name, value in (SETTINGS | settings).items() for word in ("--set", f"{name}={value}")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("RAY_ADDRESS", None)
        with self._err.open("w") as err:
            self.process = psutil.Popen(
                [sys.executable, "-m", "jobs", stage, "--preset", "demo", *words],
                cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=err, preexec_fn=_heed_ctrl_c,
            )  # fmt: skip

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until `text` is in stderr."""
        self._wait(lambda: text in self.err, seconds)

    def wait_until_it_answers(self) -> None:
        """Until it has handlers for signals: the Python interpreter itself has started."""
        self._wait(lambda: int(_status(self.process.pid)["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1, 60)

    def _wait(self, there: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            assert self.process.poll() is None, self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> list[psutil.Process]:
        """The signal, to this process alone; returns the processes it had started."""
        started: list[psutil.Process] = self.process.children(recursive=True)
        self.process.send_signal(number)
        return started

    def end(self, seconds: float = 600) -> int:
        """Its exit status; killed, and psutil.TimeoutExpired raised, if it does not end in time."""
        try:
            return int(self.process.wait(timeout=seconds))
        except psutil.TimeoutExpired:
            self.process.kill()
            raise


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell ignores in what it starts in the background


def _status(process: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":\t" in line)


def assert_interrupted(command: Command, number: signal.Signals, folder: Path) -> None:
    """It ended by this signal, with one line that names the command that goes on, and nothing else to read."""
    status, err = command.end(), command.err
    assert status == 128 + number, err
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert err.splitlines()[-1].startswith(f"mar: {word}; to resume: mar "), err
    assert err.count("mar: ") == 1, err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert not list(folder.rglob("*error.log"))


def outcome(stage: str, folder: Path) -> dict[str, Any]:
    """What the finished stage has made: its numbers that do not depend on time, and the digests of its data."""
    path = folder / STAGES[stage]
    summary = json.loads((path / "summary.json").read_text())
    changing = ("second", "share", "resumed", "rate", "flop", "mfu", "memory", "path", "checkpoint")
    numbers = {name: value for name, value in _flat(summary).items() if not any(one in name for one in changing)}
    suffixes = ("safetensors", "arrow")
    files = sorted(one for one in path.rglob("*") if one.suffix[1:] in suffixes and "ray" not in one.relative_to(path).parts)
    return numbers | {str(one.relative_to(path)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: one for part, inner in value.items() for key, one in _flat(inner, f"{name}.{part}").items()}
    if isinstance(value, list):
        return {key: one for part, inner in enumerate(value) for key, one in _flat(inner, f"{name}.{part}").items()}
    return {name: value}
