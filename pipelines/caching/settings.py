"""Section `cache` of the configuration."""

from dataclasses import dataclass
from typing import Literal

from pipelines.runtime.settings import Count, Positive, Whole, identity, operational


@dataclass
class CacheSettings:
    """Section `cache`."""

    path: str = operational("runs/mar/cache", "directory of the latent cache")
    local: str = operational("", "folder on a local disk where training keeps shards; empty: none, for a cache on S3 the temporary folder")
    local_gb: Positive = operational(50.0, "largest size of that folder")
    shard_images: Count = identity(1024, "images a shard: the unit of work, of retry and of statistics")
    dtype: Literal["float16", "float32"] = identity("float16", "float16 or float32 moments")
    batch: Count = identity(32, "images an encoder batch (batches never cross a shard)")
    encoders: Count = operational(1, "actors that hold the tokenizer")
    decoders: Whole = operational(0, "decoding threads of an encoder; 0: the cluster's CPUs, shared among the encoders")
    precision: Literal["float32", "tf32", "bf16"] = identity("float32", "arithmetic of the encoder: float32, tf32 (GPUs) or bf16")
