"""Stage *cache*: Ray Data streams images through decoding tasks into encoding actors, which write the latent cache."""

from dataclasses import dataclass

from pipelines.settings import identity, operational


@dataclass
class CacheSettings:
    """Section `cache`."""

    path: str = operational("runs/mar/cache", "directory of the latent cache")
    shard_images: int = identity(1024, "images a shard: the unit of work, of retry and of statistics")
    dtype: str = identity("float16", "float16 or float32 moments")
    batch: int = identity(32, "images an encoder batch (batches never cross a shard)")
    encoders: int = operational(1, "actors that hold the tokenizer")
    precision: str = identity("float32", "arithmetic of the encoder: float32 or bf16")
