"""Making a latent cache: images/s compared with a bare loop, precision, memory, kills, failing S3, listing. Each figure with its baseline.

    python -m benchmarks.cache [--what throughput,precision,memory,kills,faults,listing] [--images 2000]
    python -m benchmarks.cache --what forms --source FOLDER_OF_CLASS_FOLDERS

The photographs are synthetic: 500 × 375 JPEG of noise at several scales, about the size of ImageNet's. Speeds exclude Ray's start.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.cache_same_bytes import faults, forms, kills
from benchmarks.photographs import BATCH, MIDDLE, SMALL, row, write_photographs, write_tokenizer
from mar_model.tokenizers import KLConfig
from pipelines.caching.settings import CacheSettings
from pipelines.caching.shards import make, shards_of
from pipelines.caching.stage import cache
from pipelines.caching.worker import Encoder, EncodingJob
from pipelines.images.listing import Images, list_images
from pipelines.images.reading import Decoded, decode_row
from pipelines.images.settings import ImageSettings
from pipelines.runtime import progress
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.host_memory import ENVIRONMENT
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import use_threads
from pipelines.runtime.stage import Stage

SHARD = 256


def bare_loop(images: ImageSettings, tokenizer: str, threads: int) -> float:
    """Images/s of one process without Ray after the first SHARD: decoding threads, encoding of both views, moments kept in memory."""
    use_threads(ClusterSettings(threads=threads))
    encoder = Encoder(tokenizer, "float32", "float16", torch.device("cpu"))
    rows, kept = list_images(images).train(), []
    ahead: deque[Future[Decoded]] = deque()
    remaining = iter(rows)
    buffer, began = encoder.buffer(BATCH, images.size), 0.0
    with ThreadPoolExecutor(threads) as pool:
        for row in remaining:
            ahead.append(pool.submit(decode_row, images, row))
            if len(ahead) == 2 * BATCH:
                break
        for start in range(0, len(rows), BATCH):
            if start == SHARD:
                began = time.perf_counter()
            count = min(BATCH, len(rows) - start)
            for place in range(count):
                pixels = ahead.popleft().result().pixels
                assert pixels is not None
                buffer[place] = torch.from_numpy(pixels)
                if (following := next(remaining, None)) is not None:
                    ahead.append(pool.submit(decode_row, images, following))
            kept.append(encoder.encode(buffer[:count]).numpy().astype(np.float16))
    return (len(rows) - SHARD) / (time.perf_counter() - began)


def through_ray(images: ImageSettings, tokenizer: str, path: str, threads: int) -> tuple[float, dict[str, float]]:
    """Images/s of the stage's encoders after the first shard, on a running Ray instance, and the shares of time."""
    import ray

    rows = list_images(images).train()
    job = EncodingJob(images, tokenizer, path, BATCH, "float16", "float32", threads, ClusterSettings(threads=threads))
    done, seconds, began = 0, None, 0.0
    for _, record, took in make(job, 1, ray.put(rows), shards_of(len(rows), SHARD)):
        done += record["rows"]
        began = began or time.perf_counter()
        seconds = took if seconds is None else seconds + took
    assert seconds is not None
    return (done - SHARD) / (time.perf_counter() - began), seconds.shares()


def throughput(options: argparse.Namespace) -> None:
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = ImageSettings(source=write_photographs(folder / "images", options.images), size=256)
        tokenizer = write_tokenizer(folder / "tokenizer", MIDDLE)
        began = time.perf_counter()
        with connected(ClusterSettings(cpus=threads), folder / "ray.log"):
            start = time.perf_counter() - began
            speeds: list[tuple[float, float]] = []
            for run in range(options.runs):
                ours, shares = through_ray(images, tokenizer, str(folder / f"cache-{run}"), threads)
                speeds.append((ours, bare_loop(images, tokenizer, threads)))
    ours, bare = (statistics.median(values) for values in zip(*speeds, strict=True))
    figures = {"images_per_second": ours, "bare_loop": bare, "ray_start_seconds": start, "shares": shares, "runs": speeds}
    print(json.dumps({"benchmark": "cache.throughput", **figures}))
    row("images through Ray", f"{ours:.0f} images/s", f"bare loop {bare:.0f}", f"{ours / bare:.0%}", "90 %")
    row("  Ray's start", f"{start:.1f} s", "", "", "apart")


def precision(options: argparse.Namespace) -> None:
    """Each precision in a separate process: the baseline with PyTorch's defaults, the others set up like workers."""
    seconds, deviations = {}, {}
    for name in ("contiguous", "float32", "bf16"):
        command = [sys.executable, "-m", "benchmarks.cache", "--what", "encoding", "--precision", name, "--runs", str(options.runs)]
        environment = os.environ | ({} if name == "contiguous" else ENVIRONMENT)
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        seconds[name], deviations[name] = found["seconds_an_image"], found["means_rms_deviation"]
    print(json.dumps({"benchmark": "cache.precision", "seconds_an_image": seconds, "means_rms_deviation": deviations}))
    base = seconds["contiguous"]
    for name in ("float32", "bf16"):
        what, bar = f"{seconds[name]:.3f} s an image", f"3 times; deviation {deviations[name]:.1e}"
        row(f"KL-16 encoding, {name}", what, f"contiguous {base:.3f}", f"{base / seconds[name]:.2f} times", bar)


def run_encoding(options: argparse.Namespace) -> None:
    """KL-16 on batches of 8 images in one precision, for `precision`. `contiguous` is PyTorch's default float32; the others run on a
    thread, like Ray's actors."""
    plain = options.precision == "contiguous"
    if plain:
        torch.set_num_threads(os.cpu_count() or 1)
    else:
        use_threads(ClusterSettings(threads=os.cpu_count() or 1))
    images = torch.randint(0, 256, (8, 256, 256, 3), dtype=torch.uint8)
    seconds, deviation = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = write_tokenizer(Path(temporary), KLConfig())
        pool = ThreadPoolExecutor(1)
        encoder = Encoder(tokenizer, "float32" if plain else options.precision, "float32", torch.device("cpu"))
        if plain:
            encoder.tokenizer.to(memory_format=torch.contiguous_format)

        def encode() -> torch.Tensor:
            if not plain:
                return encoder.encode(images)
            with torch.inference_mode():
                return encoder.tokenizer.encode(images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1.0)

        for _ in range(options.runs + 1):
            began = time.perf_counter()
            moments = encode() if plain else pool.submit(encode).result()
            seconds.append((time.perf_counter() - began) / len(images) / (1 if plain else 2))  # the others also encode the mirror image
        if not plain:
            deviation = encoder.deviation(images, moments)["means_rms"]
    print(json.dumps({"seconds_an_image": statistics.median(seconds[1:]), "means_rms_deviation": deviation}))


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The largest proportional set size of this process and its descendants in MB, as the only element of the list."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            total = 0.0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss / 2**20
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def memory(options: argparse.Namespace) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = write_tokenizer(folder / "tokenizer", SMALL)
        for images in (2_000, 20_000):
            write_photographs(folder / f"{images}", images, size=(160, 120))
            command = [sys.executable, "-m", "benchmarks.cache", "--what", "stage", "--source", str(folder / f"{images}")]
            command += ["--tokenizer", tokenizer, "--path", str(folder / f"cache-{images}")]
            found[images] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    few, many = (one["peak_mb"] for one in found.values())
    print(json.dumps({"benchmark": "cache.memory", "runs": found}))
    row("peak PSS, 20,000 images", f"{many:.0f} MB", f"2,000: {few:.0f} MB", f"{many / few - 1:+.1%}", "+10 %")


def run_stage(options: argparse.Namespace) -> None:
    """The stage alone at a small size, measured by `memory` and killed by `kills`."""
    progress.LINE_SECONDS = 0.0  # one line per finished image, from which `kills` counts the lost ones
    cluster = ClusterSettings(cpus=2)
    images = ImageSettings(source=options.source, size=64)
    settings = CacheSettings(path=options.path, shard_images=options.shard, batch=BATCH, encoders=options.encoders)
    with peak_memory() as peak, connected(cluster, Path(options.path + ".log")):
        summary = cache(Images(images), options.tokenizer, settings, Stage("cache", cluster))
    print(json.dumps({"peak_mb": peak[0], "images": summary["images"], "seconds": summary["seconds"]}))


def listing(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for label in range(100):
            (Path(temporary) / f"n{label:08d}").mkdir()
            for number in range(1000):
                (Path(temporary) / f"n{label:08d}" / f"n{label:08d}_{number}.JPEG").touch()
        began = time.perf_counter()
        found = list_images(ImageSettings(source=temporary))
        seconds = time.perf_counter() - began
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    print(json.dumps({"benchmark": "cache.listing", "images": len(found.rows), "seconds": seconds}))
    row("list 100,000 images of a tree", f"{seconds:.2f} s", "", "", "seconds")


def main() -> None:
    measured = (throughput, precision, memory, kills, faults, forms, listing)
    pieces = {**{one.__name__: one for one in measured}, "stage": run_stage, "encoding": run_encoding}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="listing,throughput,precision,memory,kills,faults")
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--source", default="", help="for `forms`: a folder with one folder of images per class")
    for name in ("tokenizer", "path"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, default=1024, help=argparse.SUPPRESS)
    parser.add_argument("--encoders", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="contiguous", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.what.split(","):
        pieces[name](options)


if __name__ == "__main__":
    main()
