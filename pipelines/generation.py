"""Stage *generate*: images for given labels from a checkpoint, through an actor pool of Ray Data."""

from dataclasses import dataclass
from typing import Literal

from pipelines.settings import identity, operational


@dataclass
class GenerateSettings:
    """Section `generate`. Sample i is a function of (seed, i) alone, whatever batch or worker draws it."""

    path: str = operational("runs/mar/samples", "directory of the samples: shards/, images/, samples.png")
    checkpoint: str = operational("", "checkpoint directory; empty: the newest of train.path")
    images: int = identity(64, "images to draw; sample i has the label labels[i mod len(labels)]")
    labels: list[int] = identity(help="class labels, cycled through; empty: every class in turn", factory=list)
    ar_steps: int = identity(64, "autoregressive steps")
    diffusion_steps: int = identity(100, "denoising steps a token")
    guidance: float = identity(3.0, "classifier-free guidance scale; 1 is off")
    guidance_schedule: Literal["linear", "constant"] = identity("linear", "linear (grows as the image fills) or constant")
    temperature: float = identity(1.0, "factor on the noise added at every denoising step")
    limit_x0: bool = identity(True, "keep each predicted clean token inside the range seen in the cache (off: the published sampler)")
    ema: bool = identity(True, "draw with the moving average of the weights")
    precision: Literal["auto", "bf16", "float32"] = identity("auto", "matrix products: auto, bf16 or float32; sampler state is always float32")
    batch: int = operational(64, "images a batch and a shard")
    actors: int = operational(1, "actors that hold the model")
