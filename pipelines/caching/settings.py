"""Section `cache` of the configuration."""

from dataclasses import dataclass
from typing import Literal

from pipelines.runtime.settings import Count, Positive, Whole, identity, operational


@dataclass
class CacheSettings:
    """Section `cache`."""

    path: str = operational("runs/mar/cache", "directory of the latent cache")
    local: str = operational(
        "", "folder on a local disk for copies of shards in training; empty: none, for a cache on S3 the temporary folder"
    )
    local_gb: Positive = operational(50.0, "maximum size of that folder in GB")
    shard_images: Count = identity(1024, "images per shard: the unit of work, retry and statistics")
    dtype: Literal["float16", "float32"] = identity("float16", "dtype of the moments: float16 or float32")
    batch: Count = identity(32, "images per encoder batch (a batch never crosses a shard boundary)")
    encoders: Count = operational(1, "number of encoder actors")
    decoders: Whole = operational(0, "decoding threads per encoder; 0: the cluster's CPUs divided by the encoders")
    precision: Literal["float32", "tf32", "bf16"] = identity("float32", "precision of the encoder: float32, tf32 (GPUs) or bf16")
