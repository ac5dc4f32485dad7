"""Records a second from the latent cache in random order, beside the layout of one `.npz` file an image.

    python -m benchmarks.loader [--records 20000] [--batch 128] [--runs 5]

Both hold the same float16 moments of KL-16 at 256 px (2 × 32 × 16 × 16 a record); medians of alternating runs, files warm.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines import storage
from pipelines.latents import FORMAT_VERSION, MANIFEST, SHARDS, LatentCache, Manifest, shard_bytes, shard_name

SHAPE = (32, 16, 16)
SHARD = 1024


def write_cache(path: str, moments: np.ndarray, records: int) -> LatentCache:
    """A cache of `records` records that repeat `moments` (SHARD, 2C, h, w)."""
    shards = []
    for index in range(-(-records // SHARD)):
        rows = min(SHARD, records - index * SHARD)
        keys = [f"{index * SHARD + row:08d}.png" for row in range(rows)]
        data = shard_bytes(keys, [row % 1000 for row in range(rows)], moments[:rows], moments[:rows])
        storage.write_bytes(storage.join(path, SHARDS, shard_name(index)), data)
        shards.append({"name": shard_name(index), "rows": rows, "sha256": storage.digest(data), "bytes": len(data)})
    channels = SHAPE[0] // 2
    manifest = Manifest(
        format_version=FORMAT_VERSION, rows=records, shards=shards, class_names=[str(one) for one in range(1000)], image_size=256,
        latent_size=SHAPE[1], latent_channels=channels, dtype="float16", latent_mean=[0.0] * channels, latent_std=[1.0] * channels,
        latent_min=[-1.0] * channels, latent_max=[1.0] * channels, tokenizer={}, images={}, rejected=0,
    )  # fmt: skip
    storage.write_json(storage.join(path, MANIFEST), manifest.as_dict())
    return LatentCache(path)


def records_a_second(read: Callable[[np.ndarray], np.ndarray], order: np.ndarray, batch: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(order), batch):
        read(order[start : start + batch])
    return len(order) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    moments = generator.standard_normal((SHARD, *SHAPE)).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(folder + "/cache", moments, options.records)
        files = Path(folder) / "npz"
        files.mkdir()
        for index in range(min(options.records, 4096)):
            np.savez(files / f"{index}.npz", moments=moments[index % SHARD], moments_flip=moments[index % SHARD])

        def from_cache(rows: np.ndarray) -> np.ndarray:
            return cache.take(rows, rows % 2 == 0)[0]

        def from_npz(rows: np.ndarray) -> np.ndarray:
            loaded = []
            for row in rows:
                with np.load(files / f"{row}.npz") as record:
                    loaded.append(record["moments_flip" if row % 2 == 0 else "moments"])
            return np.stack(loaded)

        order = generator.permutation(options.records)
        few = generator.permutation(min(options.records, 4096))
        assert np.array_equal(from_cache(few[:64] % SHARD), from_npz(few[:64] % SHARD))
        speeds: dict[str, list[float]] = {"arrow cache": [], "one .npz an image": []}
        for _ in range(options.runs + 1):
            speeds["arrow cache"].append(records_a_second(from_cache, order, options.batch))
            speeds["one .npz an image"].append(records_a_second(from_npz, few, options.batch))
    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}  # the first run warms the files
    print(json.dumps({"benchmark": "loader", "batch": options.batch, "records_per_second": medians}))
    print(f"{'layout':<20} {'records/s':>12} {'ratio':>8}")
    for name, value in medians.items():
        print(f"{name:<20} {value:>12,.0f} {value / medians['one .npz an image']:>8.1f}")


if __name__ == "__main__":
    main()
