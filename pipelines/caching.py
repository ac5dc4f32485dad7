"""Stage *cache*: Ray Data streams images through decoding tasks into encoding actors, which write the latent cache.

    train rows, sorted by key ──▶ one block a shard ──▶ decode (tasks, CPU) ──▶ encode and write (actors) ──▶ one record a shard

A shard is a fixed range of the sorted rows and a file of its own, so neither the number of workers nor the order in which
they finish can be seen in the result, and a run that was killed keeps every shard whose record was written.
"""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet

from mar_model.tokenizers import load_tokenizer
from pipelines import storage
from pipelines.cluster import ClusterSettings, cluster_resources, worker_resources
from pipelines.encoding import ShardEncoder, decode_shard, read, shard_paths
from pipelines.errors import UserError
from pipelines.images import ImageListing, ImageRow, ImageSettings, list_images
from pipelines.latents import FORMAT_VERSION, MANIFEST, SHARDS, LatentStatistics, Manifest
from pipelines.settings import identity, identity_of, operational
from pipelines.stage import Stage
from pipelines.tokenizing import TokenizerSettings, tokenizer_digest

CHECKS_AT_ONCE = 8  # threads that compare finished shards with their checksums


@dataclass
class CacheSettings:
    """Section `cache`."""

    path: str = operational("runs/mar/cache", "directory of the latent cache")
    shard_images: int = identity(1024, "images a shard: the unit of work, of retry and of statistics")
    dtype: Literal["float16", "float32"] = identity("float16", "float16 or float32 moments")
    batch: int = identity(32, "images an encoder batch (batches never cross a shard)")
    encoders: int = operational(1, "actors that hold the tokenizer")
    precision: Literal["float32", "bf16"] = identity("float32", "arithmetic of the encoder: float32 or bf16")


def cache(images: ImageSettings, tokenizer: TokenizerSettings, cache: CacheSettings, stage: Stage) -> dict[str, Any]:
    """Encode the train part of `images` into a latent cache at `cache.path`; returns the stage's summary.

    Raises UserError on settings that don't fit each other, on a cache made with others, and when more than
    `images.max_rejected` of the images can't be used (the finished shards are kept).
    """
    channels, latent_size = _check(images, tokenizer, cache)
    listing = list_images(images)
    rows = listing.train()
    identity = {
        **identity_of(images=images, cache=cache),
        "images.train_listing": _listing_digest(listing, rows),
        "tokenizer.digest": tokenizer_digest(tokenizer.path),
    }
    summary_path = storage.join(cache.path, "summary.json")
    if storage.exists(summary_path) and not _is_whole(cache.path):
        stage.say(f"{cache.path} has lost files; they are made again")
        storage.delete(summary_path)
    summary = stage.begin(cache.path, identity)
    if summary is not None:
        return summary

    shards = {start // cache.shard_images: rows[start : start + cache.shard_images] for start in range(0, len(rows), cache.shard_images)}
    for name in storage.list_directory(storage.join(cache.path, SHARDS)):
        if name.endswith(".partial"):  # a killed run left it half written
            storage.delete(storage.join(cache.path, SHARDS, name))
    records = _finished(images, cache.path, shards)
    kept = sum(len(shards[index]) for index in records)
    if records:
        stage.say(f"{len(records)} of {len(shards)} shards are already there")
    with stage.progress(len(rows), done=kept) as bar:
        done, rejected = kept, sum(len(record["rejected"]) for record in records.values())
        for index, record in _encode(images, tokenizer, cache, stage.cluster, {i: shards[i] for i in shards if i not in records}):
            records[index] = record
            done, rejected = done + len(shards[index]), rejected + len(record["rejected"])
            bar.update(done, rejected=rejected)
            stage.log({"images_per_second": bar.rate, "rejected": rejected}, step=done)
            if rejected > images.max_rejected * len(rows):
                break  # the limit is passed, whatever the other shards hold
        rate = bar.rate
    ordered = [records[index] for index in sorted(records)]
    _write_rejected(cache.path, ordered)
    _check_rejected(images, cache.path, ordered, len(rows))

    statistics = reduce(LatentStatistics.merged, [LatentStatistics(**one["statistics"]) for one in ordered if one["rows"]])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        rows=sum(record["rows"] for record in ordered),
        shards=[{name: record[name] for name in ("name", "rows", "sha256", "bytes")} for record in ordered],
        class_names=listing.class_names,
        image_size=images.size,
        latent_size=latent_size,
        latent_channels=channels,
        dtype=cache.dtype,
        latent_mean=statistics.mean,
        latent_std=statistics.std,
        latent_min=statistics.min,
        latent_max=statistics.max,
        tokenizer={
            "path": tokenizer.path,
            "digest": identity["tokenizer.digest"],
            "config": storage.read_json(storage.join(tokenizer.path, "config.json")),
        },
        images={
            "held_out_share": images.held_out_share,
            "held_out_folder": images.held_out_folder,
            "held_out": len(listing.rows) - len(rows),
            "train_listing": identity["images.train_listing"],
        },
        rejected=rejected,
    )
    storage.write_json(storage.join(cache.path, MANIFEST), manifest.as_dict())
    size = sum(record["bytes"] for record in ordered)
    return stage.complete(
        cache.path,
        identity,
        {"images": manifest.rows, "rejected": rejected, "shards": len(ordered), "bytes": size, "images_per_second": round(rate, 3)},
    )


def _check(images: ImageSettings, tokenizer: TokenizerSettings, cache: CacheSettings) -> tuple[int, int]:
    """Latent channels and latents per side; raises UserError where the settings don't fit the tokenizer."""
    for name, allowed in (("dtype", ("float16", "float32")), ("precision", ("float32", "bf16"))):
        if getattr(cache, name) not in allowed:
            raise UserError(f"cache.{name} is {getattr(cache, name)!r}, expected {' or '.join(allowed)}")
    for name in ("shard_images", "batch", "encoders"):
        if getattr(cache, name) < 1:
            raise UserError(f"cache.{name} is {getattr(cache, name)}, expected 1 or more")
    if not storage.exists(storage.join(tokenizer.path, "config.json")):
        raise UserError(f"tokenizer.path {tokenizer.path!r} holds no tokenizer (config.json is missing); run `mar tokenize` first")
    try:
        loaded = load_tokenizer(storage.local_directory(tokenizer.path))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer.path {tokenizer.path!r} can't be loaded: {error}; run `mar tokenize` again") from error
    if images.size % loaded.stride:
        raise UserError(f"images.size is {images.size}, expected a multiple of {loaded.stride}, the stride of tokenizer {tokenizer.path!r}")
    return loaded.channels, images.size // loaded.stride


def _listing_digest(listing: ImageListing, rows: list[ImageRow]) -> str:
    text = json.dumps([listing.class_names, [(row.key, row.label) for row in rows]], ensure_ascii=True)
    return f"{len(rows)} images, sha256 {storage.digest(text.encode())}"


def _is_whole(path: str) -> bool:
    """Whether the manifest and every shard it names are there, in the length it says."""
    if not storage.exists(storage.join(path, MANIFEST)):
        return False

    def fits(shard: dict[str, Any]) -> bool:
        name = storage.join(path, SHARDS, shard["name"])
        return storage.exists(name) and storage.size(name) == shard["bytes"]

    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        return all(pool.map(fits, storage.read_json(storage.join(path, MANIFEST))["shards"]))


def _finished(images: ImageSettings, path: str, shards: dict[int, list[ImageRow]]) -> dict[int, dict[str, Any]]:
    """Records of the shards that need not be made again: those whose file has the recorded checksum, and whose rejected images
    still have the bytes they were rejected for (else they were mended)."""

    def record_of(index: int) -> dict[str, Any] | None:
        shard, record_path = shard_paths(path, index)
        if not (storage.exists(shard) and storage.exists(record_path)):
            return None
        record: dict[str, Any] = storage.read_json(record_path)
        if record["format_version"] != FORMAT_VERSION or storage.digest(storage.read_bytes(shard)) != record["sha256"]:
            return None
        rows = {row.key: row for row in shards[index]}
        mended = any(read(images, rows[one["key"]])[1] != one["sha256"] for one in record["rejected"])
        return None if mended else record

    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        found = dict(zip(shards, pool.map(record_of, shards), strict=True))
    return {index: record for index, record in found.items() if record is not None}


def _encode(
    images: ImageSettings,
    tokenizer: TokenizerSettings,
    cache: CacheSettings,
    cluster: ClusterSettings,
    shards: dict[int, list[ImageRow]],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Make these shards; yields number and record of each, in the order they finish."""
    import ray.data

    if not shards:
        return
    tables = [
        pa.table({"shard": [index] * len(rows), "key": [row.key for row in rows], "label": [row.label for row in rows]})
        for index, rows in shards.items()
    ]
    encoders = min(cache.encoders, len(shards))
    share = _cpu_share(encoders)
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # never split a block: it is a shard
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        records = (
            ray.data.from_arrow(tables)
            .map_batches(
                partial(decode_shard, images),
                batch_size=None,
                batch_format="numpy",
                num_cpus=share,
                max_calls=0,  # no limit, as without it; but operators of equal arguments would be fused, and the actors decode
            )
            .map_batches(
                ShardEncoder,
                fn_constructor_args=(tokenizer.path, cache.path, cache.batch, cache.dtype, cache.precision, cluster),
                batch_size=None,
                batch_format="numpy",
                zero_copy_batch=True,
                compute=ray.data.ActorPoolStrategy(size=encoders),
                num_cpus=share,
                num_gpus=worker_resources(cluster)["num_gpus"],
            )
        )
        for row in records.iter_rows():
            yield row["shard"], json.loads(row["record"])


def _cpu_share(encoders: int) -> float:
    """CPUs of one encoder and of one decoding task: one, or less where all encoders and a decoding task would not fit the
    cluster together and wait for each other for ever."""
    cpus, _ = cluster_resources()
    return min(1.0, math.floor(100 * cpus / (encoders + 1)) / 100) if cpus else 1.0


def _write_rejected(path: str, records: list[dict[str, Any]]) -> None:
    schema = pa.schema([("key", pa.string()), ("reason", pa.string()), ("sha256", pa.string())])
    table = pa.Table.from_pylist([one for record in records for one in record["rejected"]], schema=schema)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    storage.write_bytes(storage.join(path, "rejected.parquet"), bytes(sink.getvalue()))


def _check_rejected(images: ImageSettings, path: str, records: list[dict[str, Any]], total: int) -> None:
    rejected = [one for record in records for one in record["rejected"]]
    if len(rejected) > images.max_rejected * total or len(rejected) == total:
        first = "; ".join(f"{one['key']} ({one['reason']})" for one in rejected[:3])
        raise UserError(
            f"{len(rejected)} of {total} images can't be used, images.max_rejected={images.max_rejected} allows "
            f"{math.floor(images.max_rejected * total)}: {first}{'; …' if len(rejected) > 3 else ''}. All are in "
            f"{storage.join(path, 'rejected.parquet')}; mend those files or raise images.max_rejected, and run again "
            "(finished shards are kept)"
        )
