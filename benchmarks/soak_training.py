"""Kills a training repeatedly at random moments, and compares the result with an undisturbed run.

    python -m benchmarks.soak_training [--kills 20] [--seconds 12] [--seed 0] [--folder DIR]

Each kill is one of: SIGKILL for a worker, SIGSTOP for a worker (it hangs), SIGKILL or SIGTERM for the driver. The run resumes by itself or
is restarted. Finally weights, averages, optimizer and the loss of every interval must be bitwise equal to those of an undisturbed run, and
each key of the cache must occur exactly once per epoch.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.training_runs import RECIPE, SMALL, TOKENIZER, Recorded, write_cache
from mar_model.checkpoints.checkpoint import AVERAGE, OPTIMIZER, WEIGHTS
from mar_model.training.sample_order import SampleOrder
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.checkpoints.directory import checkpoint_path, newest_checkpoint
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.training.stage import train

KINDS = ("worker killed", "worker hangs", "driver killed", "driver terminated")


def run(folder: Path, name: str, images: int) -> None:
    """One attempt in a separate process; messages go to stdout."""
    with connected(ClusterSettings(cpus=2), folder / f"{name}-ray.log"):
        stage = Recorded(ClusterSettings())
        stage.say = lambda text: print(f"  {text}", flush=True)  # type: ignore[method-assign]
        settings = replace(
            RECIPE, path=str(folder / name), workers=2, images=images, log_images=320, checkpoint_images=640, failures=99, hang_seconds=8
        )
        train(TOKENIZER.path, CacheSettings(path=str(folder / "cache")), SMALL, settings, stage)


def start(folder: Path, name: str, images: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.soak_training", "--run", name, "--folder", str(folder), "--images", str(images)]
    )


def images_seen(folder: Path, name: str) -> int:
    newest = newest_checkpoint(str(folder / name))
    return int(newest[-12:]) if newest else 0


def disturb(driver: subprocess.Popen[bytes], kind: str) -> bool:
    """Kill once. Returns whether there was a process to kill."""
    children = psutil.Process(driver.pid).children(recursive=True)
    workers = [one for one in children if "RayTrainWorker" in " ".join(one.cmdline())]
    if kind.startswith("worker"):
        if not workers:
            return False
        random.choice(workers).send_signal(signal.SIGKILL if kind == "worker killed" else signal.SIGSTOP)
        return True
    driver.send_signal(signal.SIGKILL if kind == "driver killed" else signal.SIGTERM)
    driver.wait(timeout=120)
    psutil.wait_procs(children, timeout=30)
    return True


def soak(folder: Path, kills: int, seconds: float, images: int) -> dict[str, object]:
    started, done, happened = time.monotonic(), 0, Counter[str]()
    driver = start(folder, "disturbed", images)
    while driver.poll() is None or images_seen(folder, "disturbed") < images:
        if driver.poll() is not None:
            driver = start(folder, "disturbed", images)
        pause = time.monotonic() + random.uniform(0.3, 2) * seconds
        while driver.poll() is None and time.monotonic() < pause:
            time.sleep(0.05)
        if driver.poll() is None and done < kills:
            kind = random.choice(KINDS)
            try:
                if disturb(driver, kind):
                    done += 1
                    happened[kind] += 1
                    print(f"kill {done}: {kind}, checkpoint at {images_seen(folder, 'disturbed'):,} images", flush=True)
            except psutil.NoSuchProcess:
                continue
    return {"kills": done, **happened, "seconds": round(time.monotonic() - started)}


def compare(folder: Path, images: int) -> dict[str, object]:
    same = {}
    for file in (WEIGHTS, AVERAGE, OPTIMIZER):
        whole, parts = (load_file(Path(checkpoint_path(str(folder / name), images)) / file) for name in ("whole", "disturbed"))
        same[file] = whole.keys() == parts.keys() and all(torch.equal(whole[one], parts[one]) for one in whole)
    lines = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "disturbed")]
    whole_losses, losses = ([(row["images_seen"], row["loss"]) for row in map(json.loads, one)] for one in lines)
    cache = LatentCache(str(folder / "cache"))
    order, rows = SampleOrder(0, len(cache)), len(cache)
    epochs = [set(cache.keys(order.indices(first, first + rows))) for first in range(0, images - rows + 1, rows)]
    return {
        "bitwise": same, "loss curve equal": losses == whole_losses, "lines": len(losses),
        "each key once an epoch": all(len(one) == rows for one in epochs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=12.0, help="between kills, about")
    parser.add_argument("--images", type=int, default=64_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    if options.run:
        run(options.folder, options.run, options.images)
        return
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        write_cache(folder / "cache", rows=500)
        whole = start(folder, "whole", options.images)
        if whole.wait() != 0:
            sys.exit("the undisturbed run failed")
        found = soak(folder, options.kills, options.seconds, options.images)
        print(json.dumps({"benchmark": "soak_training", **found, **compare(folder, options.images)}))


if __name__ == "__main__":
    main()
