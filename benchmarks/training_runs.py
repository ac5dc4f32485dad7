"""The run of the training benchmarks: a small model on a cache of random latents."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from mar_model.config import Architecture
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import FORMAT_VERSION, LatentStatistics, Manifest, shard_bytes, shard_name
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.training.settings import TrainSettings

MODEL = Architecture(
    encoder_depth=4, encoder_width=256, encoder_heads=4, decoder_depth=4, decoder_width=256, decoder_heads=4, buffer_size=8,
    denoiser_depth=3, denoiser_width=512,
)  # fmt: skip
SMALL = replace(MODEL, encoder_depth=1, decoder_depth=1, encoder_width=64, decoder_width=64, denoiser_depth=1, denoiser_width=64)
RECIPE = TrainSettings(
    batch=32, micro_batch=16, learning_rate=1e-3, warmup_images=64, precision="float32", workers=1, checkpoint_images=10**9, failures=3
)
TOKENIZER = TokenizerSettings(path="tokenizer")


def write_cache(path: Path, rows: int = 2048, size: int = 8, channels: int = 8) -> LatentCache:
    draw = np.random.default_rng(0)
    moments, flipped = draw.normal(size=(2, rows, 2 * channels, size, size)).astype(np.float16)
    data = shard_bytes([f"{row:06d}" for row in range(rows)], [row % 10 for row in range(rows)], moments, flipped)
    storage.write_bytes(str(path / "shards" / shard_name(0)), data)
    statistics_ = LatentStatistics.of(moments)
    manifest = Manifest(
        format_version=FORMAT_VERSION, rows=rows, class_names=[str(one) for one in range(10)], image_size=8 * size, latent_size=size,
        latent_channels=channels, shards=[{"name": shard_name(0), "rows": rows, "sha256": storage.digest(data), "bytes": len(data)}],
        dtype="float16", latent_mean=statistics_.mean, latent_std=statistics_.std, latent_min=statistics_.min,
        latent_max=statistics_.max, tokenizer={"path": "tokenizer", "digest": "0"}, images={}, rejected=0,
    )  # fmt: skip
    storage.write_json(str(path / "manifest.json"), manifest.as_dict())
    return LatentCache(str(path))


class Recorded(Stage):
    """A stage that stores messages and metrics with their times."""

    def __init__(self, cluster: ClusterSettings) -> None:
        super().__init__("train", cluster)
        self.said: list[tuple[float, str]] = []
        self.rows: list[dict[str, float]] = []

    def say(self, text: str) -> None:
        self.said.append((time.time(), text))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append(metrics)
