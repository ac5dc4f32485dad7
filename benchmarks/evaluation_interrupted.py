"""Kills evaluations at random moments, and compares each record with that of an undisturbed evaluation. Run by `benchmarks.evaluation`.

    python -m benchmarks.evaluation_interrupted [--kills 10] [--seed 0] [--images 256]

Each kill is a SIGKILL for the driver, a drawing actor or a judging actor. Ray restarts a killed actor; after the driver the same command is
run again. When an evaluation ends before the last kill, its record is compared, and the next one begins in an empty directory.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.photographs import MIDDLE, write_photographs, write_tokenizer
from benchmarks.photographs import row as print_row
from mar_model.checkpoints.checkpoint import AVERAGE, WEIGHTS, write_checkpoint
from mar_model.config import MARConfig
from mar_model.mar import MAR
from pipelines.evaluation.record import RECORD, STATISTICS
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.stage import evaluate
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import tokenizer_digest

KINDS = {"driver": "", "drawing actor": "DrawingActor", "judging actor": "ScoringActor"}  # and what is in the name of the process
SIZE, CLASSES, REFERENCE_IMAGES = 32, 4, 64
OF_TIME = ("second", "tflops", "gflop")  # in the names of figures that depend on time, or on how many samples an attempt drew


def prepare(folder: Path) -> None:
    """A tokenizer and a checkpoint of random weights, and reference images."""
    tokenizer = write_tokenizer(folder / "tokenizer", MIDDLE)
    torch.manual_seed(1)
    config = MARConfig(
        encoder_depth=1, encoder_width=64, encoder_heads=2, decoder_depth=1, decoder_width=64, decoder_heads=2, buffer_size=4,
        denoiser_depth=2, denoiser_width=64, latent_size=4, latent_channels=4, classes=CLASSES,
    )  # fmt: skip
    weights = {name: value.detach().contiguous() for name, value in MAR(config).state_dict().items()}
    state = {
        "images_seen": 640, "step": 1, "intervals": [], "interval": [], "class_names": [str(one) for one in range(CLASSES)],
        "image_size": SIZE, "latent_mean": [0.0] * 4, "latent_std": [1.0] * 4, "latent_min": [-3.0] * 4, "latent_max": [3.0] * 4,
        "tokenizer": {"path": tokenizer, "digest": tokenizer_digest(tokenizer)},
    }  # fmt: skip
    (folder / "checkpoint").mkdir()
    write_checkpoint(folder / "checkpoint", config, {WEIGHTS: weights, AVERAGE: weights}, state)
    write_photographs(folder / "images", REFERENCE_IMAGES, (80, 60))


def attempt(folder: Path, name: str, images: int) -> None:
    """Evaluate `images` samples to `folder/name`, or resume."""
    cluster = ClusterSettings(cpus=2)
    generate = GenerateSettings(checkpoint=str(folder / "checkpoint"), ar_steps=16, diffusion_steps=50, batch=8, precision="float32")
    settings = EvaluateSettings(
        path=str(folder / name), images=images, reference=str(folder / "images"), features="efficientnet-lite0", batch=16
    )
    with connected(cluster, folder / f"{name}-ray.log"):
        stage = Stage("evaluate", cluster)
        evaluate(Images(ImageSettings(size=SIZE)), str(folder / "tokenizer"), str(folder / "train"), generate, settings, stage)


def start(folder: Path, name: str, images: int) -> subprocess.Popen[bytes]:
    """One attempt in a process of its own."""
    words = ["--attempt", name, "--folder", str(folder), "--images", str(images)]
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen([sys.executable, "-m", "benchmarks.evaluation_interrupted", *words], stdout=log, stderr=log)


def actors(driver: int, kind: str) -> list[psutil.Process]:
    """The living actors of this kind."""
    found = []
    for one in psutil.Process(driver).children(recursive=True):
        try:
            if KINDS[kind] in one.name() or KINDS[kind] in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


def undisturbed(folder: Path, images: int) -> dict[str, float]:
    """Run the evaluation that the others are compared with. Returns the seconds in which each kind of process was there."""
    began, driver = time.monotonic(), start(folder, "whole", images)
    first: dict[str, float] = {"driver": began}
    last: dict[str, float] = {}
    while driver.poll() is None:
        now = time.monotonic()
        last["driver"] = now
        for kind in ("drawing actor", "judging actor"):
            if actors(driver.pid, kind):
                first.setdefault(kind, now)
                last[kind] = now
        time.sleep(0.1)
    if driver.returncode != 0 or not storage.exists(str(folder / "whole" / RECORD)):
        sys.exit(f"the undisturbed evaluation failed:\n{(folder / 'whole.log').read_text()[-2000:]}")
    return {kind: last[kind] - first[kind] for kind in KINDS}


@dataclass
class Disturbance:
    """Kills that are still to happen, and what has happened."""

    waiting: list[str]  # kinds
    lifetimes: dict[str, float]  # seconds, by kind, of an undisturbed evaluation
    happened: Counter[str] = field(default_factory=Counter)
    moments: list[str] = field(default_factory=list)

    def disturb(self, driver: subprocess.Popen[bytes], shards: Path) -> None:
        """Wait for a random moment of the next kind's life, and kill it; returns without a kill if the driver ends before."""
        kind = self.waiting[0]
        while driver.poll() is None and kind != "driver" and not actors(driver.pid, kind):
            time.sleep(0.02)
        moment = time.monotonic() + random.uniform(0, self.lifetimes[kind])
        while driver.poll() is None and time.monotonic() < moment:
            time.sleep(0.02)
        if driver.poll() is not None:
            return
        found = [psutil.Process(driver.pid)] if kind == "driver" else actors(driver.pid, kind)
        if not found:
            return
        started = psutil.Process(driver.pid).children(recursive=True)
        random.choice(found).send_signal(signal.SIGKILL)
        self.waiting.pop(0)
        self.happened[kind] += 1
        self.moments.append(f"{kind} after {len(list(shards.glob('*.parquet')))} shards")
        if kind == "driver":
            driver.wait(timeout=60)
            psutil.wait_procs(started, timeout=30)


def differences(folder: Path, name: str) -> list[str]:
    """What the record and the statistics of an evaluation have other than the undisturbed one's; empty if they are the same."""
    whole, found = (storage.read_json(str(folder / one / RECORD)) for one in ("whole", name))
    names = {one for one in {*whole, *found} if not any(part in one for part in OF_TIME)}
    differing = sorted(one for one in names if whole.get(one) != found.get(one))
    with np.load(folder / "whole" / STATISTICS) as one, np.load(folder / name / STATISTICS) as other:
        differing += [f"{STATISTICS}: {part}" for part in one.files if not np.array_equal(one[part], other[part])]
    return differing


def kills(folder: Path, count: int = 10, images: int = 256, seed: int = 0) -> dict[str, Any]:
    """`count` kills at random moments: how many of each kind, the evaluations that they took, and what differs in their records."""
    os.environ.pop("RAY_ADDRESS", None)
    random.seed(seed)
    prepare(folder)
    lifetimes = undisturbed(folder, images)
    waiting = [list(KINDS)[number % len(KINDS)] for number in range(count)]
    random.shuffle(waiting)
    disturbance = Disturbance(waiting, lifetimes)
    evaluations, differing = 0, []
    while disturbance.waiting:
        name = f"disturbed-{evaluations}"
        while not (folder / name / "summary.json").exists():
            driver = start(folder, name, images)
            while driver.poll() is None and disturbance.waiting:
                disturbance.disturb(driver, folder / name / "shards")
            if driver.wait(timeout=600) not in (0, -signal.SIGKILL):
                sys.exit(f"a disturbed evaluation failed:\n{(folder / f'{name}.log').read_text()[-2000:]}")
        differing += [f"{name}: {one}" for one in differences(folder, name)]
        evaluations += 1
    return {
        "kills": dict(disturbance.happened), "evaluations": evaluations, "moments": disturbance.moments, "differing": differing,
        "seconds undisturbed": lifetimes["driver"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation_interrupted", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--attempt", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attempt:
        attempt(options.folder, options.attempt, options.images)
        return 0
    with tempfile.TemporaryDirectory(prefix="benchmark-evaluation-") as temporary:
        found = kills(Path(temporary), options.kills, options.images, options.seed)
    for name, value in found.items():
        print(f"{name}: {value}")
    print_row("records after kills", f"{len(found['differing'])} differences", "undisturbed", "", "none")
    return 1 if found["differing"] else 0


if __name__ == "__main__":
    sys.exit(main())
