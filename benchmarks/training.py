"""Figures of training, each with a baseline from the same run.

    python -m benchmarks.training [--what throughput workers checkpoint restart node resume scale] [--steps 24]

One torch thread per worker and a small model on a cache of random latents. Prints one JSON line per part, then a table.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.training_interrupted import node, restart, resume
from benchmarks.training_runs import MODEL, RECIPE, SMALL, TOKENIZER, Recorded, write_cache
from mar_model.checkpoints.checkpoint import AVERAGE, OPTIMIZER, WEIGHTS, optimizer_state
from mar_model.config import Architecture
from mar_model.mar import MAR, TrainingDraws
from mar_model.training.ema import WeightAverage
from mar_model.training.recipe import parameter_groups
from mar_model.training.sample_order import SampleOrder
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.checkpoints.directory import publish_checkpoint
from pipelines.checkpoints.writer import CheckpointWriter, HostMemory
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import use_threads
from pipelines.training.data import GlobalBatch, MicroBatches, Normalization, share_of
from pipelines.training.job import TrainingJob
from pipelines.training.metrics.log import MetricsLog
from pipelines.training.stage import model_config, train

SHARE = 128  # images of a global batch for each of two workers, as in the published recipe
TURNS = 3  # rounds of the compared runs, because the machine's speed drifts


class BareStep:
    """A bare loop over the step of `mar_model`: forward, backward, clip, AdamW, average, on batches in memory."""

    def __init__(self, cache: LatentCache, batches: int = 8, architecture: Architecture = MODEL, batch: int = RECIPE.batch) -> None:
        use_threads(ClusterSettings())  # like the workers
        self.batch = batch
        self.config = model_config(architecture, cache)
        self.model = MAR(self.config).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.02), lr=1e-3, fused=True)
        self.average = WeightAverage(self.model, 0.9999, True)
        self.normalize = Normalization(cache.manifest, torch.device("cpu"))
        source = MicroBatches(
            cache, self.config, batch=batch, micro_batch=min(batch, RECIPE.micro_batch), flip=True, seed=0, worker=0, workers=1
        )
        self.batches: list[GlobalBatch] = [source.prepare(batch * index) for index in range(batches)]
        self.steps = 0

    def __call__(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        share = self.batches[self.steps % len(self.batches)]
        for one in share.micro_batches:
            latents = self.normalize(one.moments, one.posterior_noise)
            loss, _ = self.model(latents, one.labels, share.masked, TrainingDraws(*one.draws))
            (loss.total.sum() / (self.batch * share.masked * self.config.diffusion_repeats)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model, self.steps)
        self.steps += 1
        return time.perf_counter() - began


def stage_rows(
    cache: LatentCache, folder: Path, workers: int, steps: int, batch: int = RECIPE.batch, line_steps: int = 4
) -> list[dict[str, float]]:
    """The metric lines of a Ray Train run, each over `line_steps`, without the first line (warm-up)."""
    with connected(ClusterSettings(), folder / "ray.log"):
        stage = Recorded(ClusterSettings())
        settings = replace(RECIPE, path=str(folder / f"run-{workers}-{time.time_ns()}"), workers=workers, batch=batch)
        settings = replace(settings, images=batch * (steps + line_steps), log_images=batch * line_steps)
        train(TOKENIZER.path, CacheSettings(path=cache.path), MODEL, settings, stage)
    return stage.rows[1 : 1 + steps // line_steps]  # followed by the summary


def throughput(folder: Path, steps: int) -> dict[str, Any]:
    """Alternate the stage and the bare loop, and compare lines of the same steps, because the time of a step depends on its mask ratio."""
    cache, line, count = write_cache(folder / "cache"), 4, max(steps // 4, 1) * 4
    ratios, stage, alone, waiting = [], list[float](), list[float](), list[float]()
    for _ in range(TURNS):
        bare = BareStep(cache, batches=line + count)
        seconds = [bare() for _ in range(line + count)][line:]
        rows = stage_rows(cache, folder, 1, count, line_steps=line)
        loop = [line * bare.batch / sum(seconds[first : first + line]) for first in range(0, count, line)]
        stage += [row["images_per_second"] for row in rows]
        alone += loop
        waiting += [row["data_wait_share"] for row in rows]
        ratios += [row["images_per_second"] / one for row, one in zip(rows, loop, strict=True)]
    return {
        "stage": statistics.median(stage), "bare loop": statistics.median(alone), "share": statistics.median(ratios), "bar": 0.95,
        "shares": [round(one, 2) for one in ratios], "data_wait_share": statistics.mean(waiting), "data_wait_bar": 0.01,
    }  # fmt: skip


def bare_loop(cache: str, steps: int, first: bool, turn: Barrier, seconds: "Queue[tuple[str, float]]") -> None:
    """One of two processes with a bare loop: first one runs alone, then both."""
    bare = BareStep(LatentCache(cache), batch=SHARE, batches=2)
    bare()
    turn.wait()
    if first:
        seconds.put(("alone", statistics.median(bare() for _ in range(steps))))
    turn.wait()
    seconds.put(("beside", statistics.median(bare() for _ in range(steps))))


def side_by_side(cache: LatentCache, steps: int) -> float:
    """The throughput of two independent processes relative to one: 2 if they do not slow each other down."""
    context = multiprocessing.get_context("spawn")
    turn, seconds = context.Barrier(2), context.Queue()
    both = [context.Process(target=bare_loop, args=(cache.path, steps, first, turn, seconds)) for first in (True, False)]
    for one in both:
        one.start()
    found = [seconds.get() for _ in range(3)]
    for one in both:
        one.join()
    alone = dict(found)["alone"]
    return sum(alone / value for name, value in found if name == "beside")


def workers(folder: Path, steps: int) -> dict[str, Any]:
    """Alternate runs of one and two workers, and compare the same steps."""
    cache = write_cache(folder / "cache")
    lines: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for count in (1, 2) * TURNS:
        lines[count] += stage_rows(cache, folder, count, max(steps // 8, 1), batch=2 * SHARE, line_steps=1)
    one, two = ([line["images_per_second"] for line in lines[count]] for count in (1, 2))
    ratios = [both / alone for alone, both in zip(one, two, strict=True)]
    return {
        "1 worker": statistics.median(one), "2 workers": statistics.median(two), "ratio": statistics.median(ratios), "bar": 1.8,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "communication_share": statistics.median(line["communication_share"] for line in lines[2]),
        "two bare loops side by side": side_by_side(cache, max(steps // 8, 1)),
    }  # fmt: skip


def job_for(cache: LatentCache, path: Path, architecture: Architecture = MODEL) -> TrainingJob:
    nobody: Any = SimpleNamespace()
    settings = replace(RECIPE, path=str(path), checkpoints_kept=1)
    return TrainingJob(model_config(architecture, cache), settings, cache, "tokenizer", 0, nobody, nobody, None)


def checkpoint(folder: Path, steps: int) -> dict[str, Any]:
    cache = write_cache(folder / "cache")
    bare = BareStep(cache, architecture=replace(MODEL, encoder_width=512, decoder_width=512, denoiser_width=768), batch=4)
    writer, memory = CheckpointWriter(replace(job_for(cache, folder / "run"), model=bare.config).checkpointed(), print, 0), HostMemory()
    for _ in range(3):
        bare()
    times: dict[bool, list[float]] = {True: [], False: []}
    copies, written = [], []
    for number in range(12):  # only a few steps overlap with a write
        began = time.perf_counter()
        files = {
            WEIGHTS: bare.model.state_dict(), AVERAGE: bare.average.weights, OPTIMIZER: optimizer_state(bare.model, bare.optimizer),
        }  # fmt: skip
        tensors = {file: {name: memory.copy(file + name, one.detach()) for name, one in named.items()} for file, named in files.items()}
        copies.append(time.perf_counter() - began)
        writer.begin(tensors, {"images_seen": number, "step": number, "intervals": []})
        began = time.perf_counter()
        while writer._writing is not None and not writer._writing.done():
            seconds = bare()
            if not writer._writing.done():  # a step during which the write ended counts for neither
                times[True].append(seconds)
        written.append(time.perf_counter() - began)
        times[False] += [bare() for _ in range(max(steps // 8, 3))]
    size = sum(one.numel() * one.element_size() for named in tensors.values() for one in named.values())
    busy, free = statistics.median(times[True]), statistics.median(times[False])
    return {
        "step while writing": busy, "step without": free, "more": busy / free - 1, "bar": 0.10,
        "steps": [len(times[True]), len(times[False])], "copy_s": statistics.median(copies[1:]),
        "write_s": statistics.median(written), "checkpoint_mb": size / 1e6,
    }  # fmt: skip


def scale(folder: Path, steps: int) -> dict[str, Any]:
    """512 workers and 1.28 million records in this process, and a quarter of that: CPU seconds, bytes and memory of each part."""
    row = {f"metric_{index}": 0.123456789 for index in range(14)}
    job = job_for(write_cache(folder / "cache", rows=64), folder / "run", SMALL)

    def sampler(size: int) -> None:
        order = SampleOrder(0, size)
        assert sum(len(order.indices(start, min(start + 2048, size))) for start in range(0, size, 2048)) == size

    def dealt(size: int) -> None:
        count = size // 2500
        assert sum(len(share_of(worker, count, 2 * count)) for worker in range(count)) == 2 * count

    def lines(size: int) -> None:
        path = folder / "metrics.jsonl"
        path.unlink(missing_ok=True)
        log = MetricsLog(str(path), 0)
        for index in range(size * 400 // 51_200):
            log.add({"images_seen": index + 1, **row})

    def state_bytes(size: int) -> int:
        intervals = [dict(row, images_seen=size - index) for index in range(100)]
        path = publish_checkpoint(
            job.train.path, job.model, {}, {"images_seen": size, "step": 1, "intervals": intervals, **job.checkpointed().about}
        )
        return Path(path, "state.json").stat().st_size

    def seconds(part: Callable[[int], None], size: int) -> float:
        found = []
        for _ in range(3):
            began = time.process_time()
            part(size)
            found.append(time.process_time() - began)
        return min(found)

    parts = {
        "sampler, an epoch (CPU s)": lambda size: seconds(sampler, size),
        "distributing micro-batches to all workers (CPU s)": lambda size: seconds(dealt, size),
        "metrics.jsonl, 400 epochs (CPU s)": lambda size: seconds(lines, size),
        "state.json (bytes)": state_bytes,
    }
    rows: dict[str, Any] = {"bar": "growth of about 4: linear"}
    for name, part in parts.items():
        quarter, whole = part(320_000), part(1_280_000)
        rows[name] = {"a quarter": quarter, "whole": whole, "growth": whole / quarter}
    return {**rows, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


PARTS = {one.__name__: one for one in (throughput, workers, checkpoint, restart, node, resume, scale)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name in options.what:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = PARTS[name](Path(folder), options.steps)
        print(json.dumps({"benchmark": "training", "what": name, "model": asdict(MODEL)["encoder_width"], **found[name]}), flush=True)
    for name, figures in found.items():
        print(f"\n{name}")
        for key, value in figures.items():
            print(f"  {key:<40} {value:.4g}" if isinstance(value, float) else f"  {key:<40} {value}")


if __name__ == "__main__":
    main()
