"""Training with killed workers, failed nodes, and resumes: seconds to the next step, bitwise equality, and keys per epoch.
Run by `benchmarks.training`."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from benchmarks.training_runs import RECIPE, SMALL, TOKENIZER, Recorded, write_cache
from mar_model.checkpoints.checkpoint import AVERAGE, OPTIMIZER, WEIGHTS
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.checkpoints.directory import checkpoint_path
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.training.data import GlobalBatch, MicroBatches
from pipelines.training.stage import train
from pipelines.training.worker import Training


def after(run: Path, images: int, event: Callable[[], object]) -> threading.Thread:
    """Call `event` when the run has a checkpoint at this many images."""

    def act() -> None:
        while not Path(checkpoint_path(str(run), images)).exists():
            time.sleep(0.01)
        event()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def interrupted(cache: LatentCache, run: Path, cluster: ClusterSettings, event: Callable[[], object], **changed: Any) -> dict[str, Any]:
    """A run with `event` after the second checkpoint: seconds from the event to the next step, by phase."""
    happened: list[float] = []

    def happen() -> None:
        happened.append(time.time())
        event()

    stage = Recorded(cluster)
    settings = replace(RECIPE, path=str(run), workers=2, images=1280, log_images=32, checkpoint_images=320)
    after(run, 640, happen)
    train(TOKENIZER.path, CacheSettings(path=cache.path), SMALL, replace(settings, **changed), stage)
    noticed, cause = next((at, text) for at, text in stage.said if "restarting" in text)
    again = next(text for _, text in stage.said if "running again" in text)
    later = float(again.split("(")[1].split(" s later")[0])
    return {"noticed_s": noticed - happened[0], "to the next step_s": noticed - happened[0] + later, "cause": cause, "told": again}


def kill_worker() -> None:
    found = [one for one in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(one.cmdline())]
    found[-1].kill()


def restart(folder: Path, steps: int) -> dict[str, Any]:
    cache = write_cache(folder / "cache")
    with connected(ClusterSettings(), folder / "ray.log"):
        return {"bar_s": 30, **interrupted(cache, folder / "run", ClusterSettings(), kill_worker)}


def node(folder: Path, steps: int) -> dict[str, Any]:
    cache = write_cache(folder / "cache")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        lose = lambda: cluster.remove_node(other, allow_graceful=False)  # noqa: E731
        return {"bar_s": 45, **interrupted(cache, folder / "run", ClusterSettings(), lose, workers_min=1)}
    finally:
        ray.shutdown()
        cluster.shutdown()


def record_reads() -> None:
    """Called by Ray in each process that it starts. A training worker then records the keys of each step."""
    read, prepare, step = LatentCache.take, MicroBatches.prepare, Training._step
    keys: dict[int, list[str]] = {}  # of this worker's share of the global batch, by its first image
    reading: list[str] = []

    def take(self: LatentCache, indices: np.ndarray, *rest: Any, **named: Any) -> Any:
        reading.extend(self.keys(indices))
        return read(self, indices, *rest, **named)

    def prepared(self: MicroBatches, images_seen: int) -> GlobalBatch:
        reading.clear()
        share = prepare(self, images_seen)
        keys[images_seen] = list(reading)
        return share

    def stepped(self: Training, share: GlobalBatch) -> None:
        step(self, share)
        with Path(self.train.path, f"keys-{os.getpid()}.txt").open("a") as file:
            file.write(f"{share.images_seen} {self.worker} {' '.join(keys[share.images_seen])}\n")

    LatentCache.take, MicroBatches.prepare, Training._step = take, prepared, stepped  # type: ignore[method-assign]


def keys_of_steps(run: Path) -> tuple[list[str], int]:
    """The keys of all images of a run in the order of its steps, and the number of steps that were repeated after a kill (the keys of the
    last repetition count)."""
    files = sorted(run.glob("keys-*.txt"), key=lambda file: file.stat().st_mtime_ns)
    lines = [line.split() for file in files for line in file.read_text().splitlines()]
    last = {(int(images_seen), int(worker)): keys for images_seen, worker, *keys in lines}
    return [key for _, keys in sorted(last.items()) for key in keys], len(lines) - len(last)


def resume(folder: Path, steps: int) -> dict[str, Any]:
    """An uninterrupted run, a resumed run, and a run with a worker killed by SIGKILL."""
    cache = write_cache(folder / "cache", rows=200)
    settings = replace(RECIPE, workers=2, images=1280, log_images=32, checkpoint_images=320)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # worker processes may not find it
    ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"worker_process_setup_hook": record_reads})
    try:
        for name, parts in (("whole", (1280,)), ("parts", (480, 1280))):
            for images in parts:
                run = replace(settings, path=str(folder / name), images=images)
                train(TOKENIZER.path, CacheSettings(path=cache.path), SMALL, run, Recorded(ClusterSettings()))
        interrupted(cache, folder / "killed", ClusterSettings(), lambda: (time.sleep(0.15), kill_worker()))  # a few steps later
    finally:
        ray.shutdown()
    found: dict[str, Any] = {}
    (expected, _), whole = keys_of_steps(folder / "whole"), checkpoint_path(str(folder / "whole"), 1280)
    for name in ("parts", "killed"):
        keys, again = keys_of_steps(folder / name)
        path, same = checkpoint_path(str(folder / name), 1280), {}
        for file in (WEIGHTS, AVERAGE, OPTIMIZER):
            one, other = load_file(Path(whole) / file), load_file(Path(path) / file)
            same[file] = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        epochs = [set(keys[start : start + 200]) for start in range(0, 1200, 200)]
        found |= {
            f"{name}: bitwise": same,
            f"{name}: keys that the workers read": "each once in each of 6 epochs" if all(len(one) == 200 for one in epochs) else "OTHERS",
            f"{name}: the same images in each step": keys == expected and len(keys) == 1280,
            f"{name}: steps taken again": again,
        }
    return found
