"""Reading the latent cache in training, compared with the layouts that it replaces. Each figure with its baseline; medians.

    python -m benchmarks.loader [--records 20000] [--batch 128] [--runs 5] [--what read,posterior,open,sampler,check]

Records are those of KL-16 at 256 px: float16 moments of image and mirror image, 2 × 32 × 16 × 16. Files are in the page cache. Baselines
alternate with the measurements in the same run.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from mar_model.noise import stream
from mar_model.training.sample_order import SampleOrder
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import FORMAT_VERSION, MANIFEST, SHARDS, Manifest, shard_bytes, shard_name
from pipelines.runtime import storage
from pipelines.training.data import LatentDataset, Normalization

SHAPE = (32, 16, 16)
SHARD = 1024
FILES = 4096  # records for the layout with one file per image
IMAGENET_SHARDS = 1280
EPOCH_RATE = 1000.0  # images/s of one GPU, faster than any size of the model trains: the shortest epoch of one worker


def write_cache(path: str, moments: np.ndarray, records: int, shard: int = SHARD) -> LatentCache:
    """A cache of `records` records that repeat `moments` (shard, 2C, h, w); shards of equal length have the same bytes."""
    entries, made = [], dict[int, bytes]()
    for index in range(-(-records // shard)):
        rows = min(shard, records - index * shard)
        if rows not in made:
            keys = [f"{row:08d}.png" for row in range(rows)]
            made[rows] = shard_bytes(keys, [row % 1000 for row in range(rows)], moments[:rows], moments[:rows])
        storage.write_bytes(storage.join(path, SHARDS, shard_name(index)), made[rows])
        entries.append({"name": shard_name(index), "rows": rows, "sha256": storage.digest(made[rows]), "bytes": len(made[rows])})
    channels = moments.shape[1] // 2
    manifest = Manifest(
        format_version=FORMAT_VERSION, rows=records, shards=entries, class_names=[str(one) for one in range(1000)], image_size=256,
        latent_size=moments.shape[2], latent_channels=channels, dtype="float16", latent_mean=[0.0] * channels,
        latent_std=[1.0] * channels, latent_min=[-1.0] * channels, latent_max=[1.0] * channels,
        tokenizer={"digest": "0" * 64}, images={}, rejected=0,
    )  # fmt: skip
    storage.write_json(storage.join(path, MANIFEST), manifest.as_dict())
    return LatentCache(path)


def records_a_second(read: Callable[[int, int], object], records: int, batch: int) -> float:
    began = time.perf_counter()
    for start in range(0, records, batch):
        read(start, min(start + batch, records))
    return records / (time.perf_counter() - began)


def reading(records: int, batch: int, runs: int) -> None:
    generator = np.random.default_rng(0)
    moments = generator.standard_normal((SHARD, *SHAPE)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        dataset = LatentDataset(write_cache(folder + "/cache", moments, records), seed=0)
        few = min(records, FILES)
        npz, tensors = Path(folder) / "npz", Path(folder) / "safetensors"
        npz.mkdir()
        tensors.mkdir()
        for index in range(few):
            np.savez(npz / f"{index}.npz", moments=moments[index % SHARD], moments_flip=moments[index % SHARD])
        for number in range(-(-few // SHARD)):
            save_file({"moments": moments, "moments_flip": moments}, tensors / f"{number}.safetensors")
        order = generator.permutation(few)

        def from_cache(start: int, stop: int) -> torch.Tensor:
            return dataset.read(start, stop, np.arange(start, stop) % 2 == 0)[0]

        def name(row: int) -> str:
            return "moments_flip" if row % 2 == 0 else "moments"

        def from_npz(start: int, stop: int) -> np.ndarray:
            loaded = []
            for row in order[start:stop]:
                with np.load(npz / f"{row}.npz") as record:
                    loaded.append(record[name(row)])
            return np.stack(loaded)

        def from_safetensors(start: int, stop: int) -> np.ndarray:
            loaded = []
            for row in order[start:stop]:
                with safe_open(tensors / f"{row // SHARD}.safetensors", "pt") as shard:  # like map-style datasets
                    loaded.append(shard.get_slice(name(row))[row % SHARD : row % SHARD + 1])
            return torch.cat(loaded).numpy()

        assert np.array_equal(from_npz(0, 64), from_safetensors(0, 64))
        layouts = {
            "arrow cache": (from_cache, records),
            "one .npz an image": (from_npz, few),
            "one safetensors slice an image": (from_safetensors, few),
        }
        speeds: dict[str, list[float]] = {layout: [] for layout in layouts}
        for _ in range(runs + 1):  # the first run warms the files
            for layout, (read, count) in layouts.items():
                speeds[layout].append(records_a_second(read, count, batch))
    medians = {layout: statistics.median(values[1:]) for layout, values in speeds.items()}
    ours, per_npz, per_slice = medians.values()
    print(json.dumps({"benchmark": "loader", "batch": batch, "records_per_second": medians}))
    row("random records, float16 moments", f"{ours:,.0f} records/s", f"npz {per_npz:,.0f}", f"{ours / per_npz:.0f} times", "50 times")
    row("", "", f"safetensors {per_slice:,.0f}", f"{ours / per_slice:.0f} times", "30 times")


def posterior(records: int, batch: int, runs: int) -> None:
    moments = np.random.default_rng(0).standard_normal((SHARD, *SHAPE)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        dataset = LatentDataset(write_cache(folder, moments, min(records, 8 * SHARD)), seed=0)
        normalize = Normalization(dataset.cache.manifest, torch.device("cpu"))
        channels, side = SHAPE[0] // 2, SHAPE[1]

        def samples(start: int, stop: int) -> torch.Tensor:
            read, _ = dataset.read(start, stop, np.zeros(stop - start, bool))
            return normalize(read, torch.randn(stop - start, channels, side, side, generator=stream(0, start, "posterior")))

        speeds = [records_a_second(samples, len(dataset.cache), batch) for _ in range(runs + 1)][1:]
    value = statistics.median(speeds)
    print(json.dumps({"benchmark": "loader.posterior", "threads": torch.get_num_threads(), "records_per_second": value}))
    row("normalised posterior samples, CPU", f"{value:,.0f} records/s", f"{torch.get_num_threads()} threads", "", "35,000 records/s")


def opening(batch: int) -> None:
    records = IMAGENET_SHARDS * 1001
    tiny = np.zeros((1001, 2, 1, 1), np.float16)
    with tempfile.TemporaryDirectory() as folder:
        write_cache(folder, tiny, records, shard=1001)
        seconds = []
        for seed in range(5):
            began = time.perf_counter()
            next(LatentDataset(LatentCache(folder), seed).batches(0, batch))
            seconds.append(time.perf_counter() - began)
    value = statistics.median(seconds)
    print(json.dumps({"benchmark": "loader.open", "records": records, "shards": IMAGENET_SHARDS, "seconds": value}))
    row(f"open {records:,} records, first batch", f"{value:.3f} s", f"{IMAGENET_SHARDS} shards", "", "2 s")


def checking(records: int, batch: int, runs: int) -> None:
    """Verify the SHA-256 of all shards on one thread: alone, and during an epoch, alternating with an epoch without verification. CPU
    seconds are reported too, because the machine may be busy."""
    moments = np.random.default_rng(0).standard_normal((SHARD, *SHAPE)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_cache(folder, moments, records).manifest.shards
        size = sum(shard["bytes"] for shard in shards) / 1e9
        alone, processor, without, beside = [], [], [], []
        for _ in range(runs + 1):  # the first run warms the files
            checks, began, worked = LatentCache(folder).checked_beside(), time.perf_counter(), time.process_time()
            checks.begin(range(len(shards)))
            checks.settle()
            alone.append(time.perf_counter() - began)
            processor.append(time.process_time() - worked)
            for seconds, compared in ((without, False), (beside, True)):
                cache = LatentCache(folder)
                dataset, began = LatentDataset(cache, seed=0), time.perf_counter()
                if not compared:
                    cache.checks.begun.update(range(len(shards)))
                for start in range(0, records, batch):
                    dataset.read(start, min(start + batch, records), np.zeros(min(batch, records - start), bool))
                dataset.settle_checks()
                seconds.append(time.perf_counter() - began)
    speed, of_processor = (size / statistics.median(one[1:]) for one in (alone, processor))
    added = statistics.median(beside[1:]) - statistics.median(without[1:])
    images = IMAGENET_SHARDS * SHARD
    whole, epoch = size * images / records, images / EPOCH_RATE
    found = {"gb": size, "gb_per_second": speed, "gb_per_processor_second": of_processor, "seconds_added_to_reads_alone": added}
    print(json.dumps({"benchmark": "loader.check", **found, "share_of_the_first_epoch": whole / speed / epoch}))
    row("SHA-256 of the shards, one thread", f"{speed:.2f} GB/s", f"{of_processor:.2f} a CPU second", "", "1 GB/s")
    row(f"  ImageNet's {whole:.0f} GB, beside", f"{whole / speed:.0f} s", f"an epoch {epoch:.0f} s", f"{whole / speed / epoch:.1%}", "5 %")


def sampling() -> None:
    rows = 2_000_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = SampleOrder(7, rows)
    seconds = []
    for step in range(200):
        began = time.perf_counter()
        found = order.indices(step * 10_000_000, step * 10_000_000 + 1024)
        seconds.append(time.perf_counter() - began)
        assert len(np.unique(found)) == 1024
        assert np.array_equal(order.positions(found, 0), np.arange(step * 10_000_000, step * 10_000_000 + 1024))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    sample = order.indices(123_456_789, 123_456_789 + 10**6)
    counts = np.bincount(sample * 1000 // rows, minlength=1000)
    chi_square = float(((counts - 1000.0) ** 2 / 1000.0).sum())  # 999 degrees of freedom: 999 ± 45
    value = statistics.median(seconds)
    print(json.dumps({"benchmark": "loader.sampler", "rows": rows, "seconds": value, "memory_mb": grown, "chi_square_999": chi_square}))
    row("next 1,024 of 2 billion indices", f"{value * 1000:.2f} ms", "inverse agrees", "", "5 ms")
    row("  memory that it took", f"{grown:.1f} MB", "", "", "50 MB")
    row("  chi-square of a million indices", f"{chi_square:.0f}", "999 ± 45 expected", "", "uniform")


def row(what: str, found: str, baseline: str, ratio: str, bar: str) -> None:
    print(f"{what:<36} {found:>20} {baseline:>20} {ratio:>12} {'bar ' + bar:>22}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--what", default="sampler,open,posterior,read,check")
    options = parser.parse_args()
    pieces: dict[str, Callable[[], None]] = {
        "sampler": sampling,
        "open": lambda: opening(options.batch),
        "posterior": lambda: posterior(options.records, options.batch, options.runs),
        "check": lambda: checking(options.records, options.batch, options.runs),
        "read": lambda: reading(options.records, options.batch, options.runs),
    }
    for name in options.what.split(","):
        pieces[name]()


if __name__ == "__main__":
    main()
