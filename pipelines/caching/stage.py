"""Stage *cache*: Ray Data distributes shards over a pool of encoders, which decode images on threads and encode them with a tokenizer.

    source ──▶ listing, sorted by key ──▶ ranges of rows ──▶ encoders: decode │ encode │ write ──▶ one record per shard ──▶ manifest

A shard is one file with a fixed range of the sorted training rows, so that the result does not depend on the number of encoders or their
order, and a killed run keeps every shard with a record.
"""

import math
from functools import reduce
from typing import Any

from mar_model.tokenizers import load_tokenizer
from pipelines.caching.cached_images import TRAIN_LISTING, settle_identity
from pipelines.caching.latent_cache import read_manifest
from pipelines.caching.latent_format import FORMAT_VERSION, MANIFEST, LatentStatistics, Manifest
from pipelines.caching.records import REJECTED, read_rejected, write_rejected
from pipelines.caching.settings import CacheSettings
from pipelines.caching.shard_checks import absolve, condemned
from pipelines.caching.shards import Shard, are_whole, finished, make, shards_of
from pipelines.caching.worker import EncodingJob, Seconds
from pipelines.images.listing import Images, keep_listing, kept_listing, listing_digest
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import LISTING
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.cluster.workers import cluster_resources
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import check, identity_of
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import latents_digest, tokenizer_config


def cache(images: Images, tokenizer_path: str, cache: CacheSettings, stage: Stage, check: bool = False) -> dict[str, Any]:
    """Encode the training part of `images` with the tokenizer in directory `tokenizer_path` into a latent cache at `cache.path`. Returns
    the stage's summary. `check`: read every image of finished shards again, and compare its bytes with the encoded ones.

    Raises UserError for contradicting settings, for an existing cache of other settings or images, and when the share of unusable images
    exceeds `images.max_rejected` (finished shards are kept).
    """
    channels, latent_size = _check(images.settings, tokenizer_path, cache)
    kept = storage.join(cache.path, LISTING)
    listing = images.listing
    for remark in listing.remarks:
        stage.say(remark)
    rows = listing.train()
    identity = {
        **identity_of(images=images.settings, cache=cache),
        TRAIN_LISTING: listing_digest(listing, rows),
        "tokenizer.digest": latents_digest(tokenizer_path),
    }
    shards = shards_of(len(rows), cache.shard_images)
    identity = settle_identity(images.settings, cache.path, listing, shards, identity, stage, check)
    summary = stage.begin(cache.path, identity, enough=lambda _: not lost_file(cache.path))
    if summary is not None:
        return summary

    summary_path = storage.join(cache.path, "summary.json")
    if storage.exists(storage.join(cache.path, MANIFEST)) or storage.exists(summary_path):
        if lost := lost_file(cache.path):
            stage.say(f"{cache.path} is incomplete, missing files are made again: {lost}")
        storage.delete(summary_path)
    storage.delete_partial(cache.path)
    keep_listing(kept, listing)
    records, rate, seconds = _make(images.settings, tokenizer_path, cache, rows, shards, stage)
    ordered = [records[index] for index in sorted(records)]
    rejected = sum(len(record["rejected"]) for record in ordered)
    write_rejected(cache.path, ordered)
    _check_rejected(images.settings, cache.path, ordered, len(rows))

    statistics = reduce(LatentStatistics.merged, [LatentStatistics(**record["statistics"]) for record in ordered if record["rows"]])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        rows=sum(record["rows"] for record in ordered),
        shards=[{name: record[name] for name in ("name", "rows", "sha256", "bytes")} for record in ordered],
        class_names=listing.class_names,
        image_size=images.settings.size,
        latent_size=latent_size,
        latent_channels=channels,
        dtype=cache.dtype,
        latent_mean=statistics.mean,
        latent_std=statistics.std,
        latent_min=statistics.min,
        latent_max=statistics.max,
        tokenizer={
            "digest": identity["tokenizer.digest"],
            "config": tokenizer_config(tokenizer_path),
        },
        precision={"name": cache.precision, "deviation": ordered[0]["deviation"]},
        images={
            "held_out_share": images.settings.held_out_share,
            "held_out_folder": images.settings.held_out_folder,
            "held_out": len(listing.rows) - len(rows),
            "train_listing": identity[TRAIN_LISTING],
        },
        rejected=rejected,
    )
    storage.write_json(storage.join(cache.path, MANIFEST), manifest.as_dict())
    absolve(cache.path)
    shares = {f"share_{name}": round(share, 3) for name, share in seconds.shares().items()}
    return stage.complete(
        cache.path,
        identity,
        {
            "images": manifest.rows,
            "rejected": rejected,
            "shards": len(ordered),
            "bytes": sum(record["bytes"] for record in ordered),
            **({"images_per_second": round(rate, 3)} | shares if rate else {}),  # without encoding there is no speed
        },
    )


def _make(
    images: ImageSettings, tokenizer: str, cache: CacheSettings, rows: ImageRows, shards: dict[int, Shard], stage: Stage
) -> tuple[dict[int, dict[str, Any]], float, Seconds]:
    """Records of all shards; makes the missing ones until too many images are rejected. Also returns images per second and the encoders'
    timings."""
    import ray

    encoders = min(cache.encoders, len(shards))
    cpus, _ = cluster_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    job = EncodingJob(
        images, tokenizer, cache.path, cache.batch, cache.dtype, cache.precision,
        cache.decoders or max(1, int(cpus) // max(encoders, nodes)), stage.cluster,
    )  # fmt: skip
    shared = ray.put(rows)  # once, for all tasks and actors
    records = finished(images, cache.path, shared, shards, stage.say)
    if records:
        stage.say(f"{len(records)} of {len(shards)} shards are already finished")
    rejected = sum(len(record["rejected"]) for record in records.values())
    seconds = Seconds()

    def done() -> int:
        return sum(shards[index].images for index in records)

    with stage.progress(len(rows), done=done()) as bar:
        left = {index: shards[index] for index in shards if index not in records}
        for index, record, took in make(job, encoders, shared, left, begun=lambda images: bar.update(done() + images)):
            records[index] = record
            rejected, seconds = rejected + len(record["rejected"]), seconds + took
            bar.update(done(), rejected=rejected, **{f"{name}_%": 100 * share for name, share in seconds.shares().items()})
            stage.log({"images_per_second": bar.rate, "rejected": rejected}, step=done())
            if rejected > images.max_rejected * len(rows):
                break  # the limit is exceeded, whatever the other shards contain
        rate = bar.rate
    return records, rate, seconds


def _check(images: ImageSettings, tokenizer: str, cache: CacheSettings) -> tuple[int, int]:
    """Latent channels and latents per side. Raises UserError if the settings do not fit the tokenizer."""
    check(images=images, cache=cache)
    if not storage.exists(storage.join(tokenizer, "config.json")):
        raise UserError(f"tokenizer.path {tokenizer!r} is not a tokenizer (config.json is missing)", remedy="run `mar tokenize` first")
    try:
        loaded = load_tokenizer(storage.local_directory(tokenizer))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer.path {tokenizer!r} can't be loaded: {error}", remedy="run `mar tokenize` again") from error
    if images.size % loaded.stride:
        raise UserError(f"images.size is {images.size}, expected a multiple of {loaded.stride}, the stride of tokenizer {tokenizer!r}")
    return loaded.channels, images.size // loaded.stride


def lost_file(path: str) -> str:
    """Missing or damaged files of a finished cache, or shards of the wrong length, in words; empty if the cache is complete."""
    listing = storage.join(path, LISTING)
    if names := condemned(path):
        return f"damaged shards ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})"
    try:
        if kept_listing(listing) is None:
            return f"{listing} is missing or damaged"
        read_rejected(path)
        manifest, _ = read_manifest(path)
    except FileNotFoundError as error:
        return f"{storage.join(path, MANIFEST)} or {REJECTED} is missing ({error})"
    except UserError as error:
        return str(error)
    return "" if are_whole(path, manifest.shards) else f"shards in {storage.join(path, MANIFEST)} are missing or have another length"


def _check_rejected(images: ImageSettings, path: str, records: list[dict[str, Any]], total: int) -> None:
    rejected = [image for record in records for image in record["rejected"]]
    if len(rejected) > images.max_rejected * total or len(rejected) == total:
        first = "; ".join(f"{image['key']} ({image['reason']})" for image in rejected[:3])
        raise UserError(
            f"{len(rejected)} of {total} images can't be used, but images.max_rejected={images.max_rejected} allows "
            f"{math.floor(images.max_rejected * total)}: {first}{'; …' if len(rejected) > 3 else ''} (all are listed in "
            f"{storage.join(path, REJECTED)})",
            remedy="repair these files in place (removing them changes the source's digest) or raise images.max_rejected, then run again "
            "(finished shards are kept)",
        )
