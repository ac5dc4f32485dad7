"""A latent cache of random moments, written without images and encoders, and a model small enough to train on it in a second."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mar_model.config import Architecture
from pipelines.caching.latent_format import LatentStatistics, Manifest, shard_bytes, shard_name
from pipelines.caching.settings import CacheSettings
from pipelines.runtime import storage
from pipelines.tokenizing.settings import TokenizerSettings

ARCHITECTURE = Architecture(
    encoder_depth=1, encoder_width=32, encoder_heads=2, decoder_depth=1, decoder_width=32, decoder_heads=2, buffer_size=2,
    denoiser_depth=1, denoiser_width=32,
)  # fmt: skip


def write_latents(
    path: Path,
    rows: int = 40,
    classes: tuple[str, ...] = ("ant", "bee"),
    size: int = 4,
    channels: int = 4,
    unsound: Sequence[int] = (),
) -> CacheSettings:
    """`rows` images in one shard, their keys `class/row`; the latents of the rows `unsound` are not finite."""
    draw = np.random.default_rng(0)
    moments, flipped = draw.normal(size=(2, rows, 2 * channels, size, size)).astype(np.float16)
    statistics = LatentStatistics.of(moments).merged(LatentStatistics.of(flipped))
    moments[list(unsound)] = flipped[list(unsound)] = np.nan
    labels = [row % len(classes) for row in range(rows)]
    data = shard_bytes([f"{classes[label]}/{row:04d}" for row, label in enumerate(labels)], labels, moments, flipped)
    storage.write_bytes(storage.join(str(path), "shards", shard_name(0)), data)
    manifest = Manifest(
        format_version=1, rows=rows, class_names=list(classes), image_size=4 * size, latent_size=size, latent_channels=channels,
        shards=[{"name": shard_name(0), "rows": rows, "sha256": storage.digest(data), "bytes": len(data)}], dtype="float16",
        latent_mean=statistics.mean, latent_std=statistics.std, latent_min=statistics.min, latent_max=statistics.max,
        tokenizer={"path": "tokenizer", "digest": "0" * 64}, images={}, rejected=0,
    )  # fmt: skip
    storage.write_json(storage.join(str(path), "manifest.json"), manifest.as_dict())
    return CacheSettings(path=str(path))


TOKENIZER = TokenizerSettings(path="tokenizer")
