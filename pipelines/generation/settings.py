"""Section `generate` of the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pipelines.runtime.settings import Count, NonNegative, Share, Whole, identity, operational

# of the published schedule; generation respaces them to fewer
DiffusionSteps = Annotated[int, Field(ge=1, le=1000, description="a number above 0, 1000 or fewer")]


@dataclass
class GenerateSettings:
    """Section `generate`. Sample i is a function of (seed, i) alone, whatever batch or worker draws it."""

    path: str = operational("runs/mar/samples", "directory of the samples: shards/, images/, samples.png")
    checkpoint: str = operational("", "checkpoint directory; empty: the newest of train.path")
    images: Count = identity(64, "images to draw; sample i has the label labels[i mod len(labels)]")
    labels: list[int | str] = identity(help="class numbers or names, cycled through; empty: every class in turn", factory=list)
    samples: list[int] = identity(help="numbers of the samples to draw; empty: 0 … images − 1", factory=list)
    ar_steps: Count = identity(64, "autoregressive steps")
    diffusion_steps: DiffusionSteps = identity(100, "denoising steps a token")
    guidance: NonNegative = identity(3.0, "classifier-free guidance scale; 1 is off")
    guidance_schedule: Literal["linear", "constant"] = identity("linear", "linear (grows as the image fills) or constant")
    temperature: NonNegative = identity(1.0, "factor on the noise added at every denoising step")
    sampler: Literal["ancestral", "ddim"] = identity("ancestral", "ancestral (as published) or ddim")
    eta: Share = identity(0.0, "noise of ddim: 0 none, 1 as much as the posterior has")
    limit_x0: bool = identity(True, "keep each predicted clean token inside the range seen in the cache (off: the published sampler)")
    diffusion_steps_end: Whole = identity(0, "fast: denoising steps at the last AR step, fewer and fewer from diffusion_steps on; 0: off")
    reuse_steps: Whole = identity(0, "fast: AR steps that reuse features after each complete one; 0: off")
    guidance_interval: list[float] = identity(
        help="fast: shares of the noise schedule (0 clean, 1 noise) between which guidance acts; [0, 1]: off", factory=lambda: [0.0, 1.0]
    )
    image: str = operational("", "complete this image: draw what the mask hides, keep the rest")
    mask: str = operational("", "of the image's size: white is drawn anew")
    keep_pixels: bool = identity(True, "completion: the image's own pixels where the mask is black (off: all as decoded)")
    ema: bool = identity(True, "draw with the moving average of the weights")
    ema_decay: NonNegative = identity(0.0, "with which, where train.ema_decays made several; 0: that of train.ema_decay")
    precision: Literal["auto", "bf16", "float32"] = identity(
        "auto", "matrix products: auto, bf16 or float32; sampler state is always float32"
    )
    compile: bool = identity(False, "torch.compile the model's blocks: minutes at first, then faster")
    batch: Count = operational(64, "images a batch and a shard")
    actors: Count = operational(1, "actors that hold the model")
    cuda_graph: bool = operational(False, "on a GPU: capture the denoiser's loop as CUDA graphs")
    film: bool = operational(False, "write film.webp, the picture as it forms")

    def relations(self) -> Iterator[tuple[str, str]]:
        """(field, what is wrong) of values that do not fit each other."""
        steps, end, interval = self.diffusion_steps, self.diffusion_steps_end, self.guidance_interval
        wrong = {
            "labels": any(isinstance(one, int) and one < 0 for one in self.labels) and "class numbers from 0",
            "samples": (any(one < 0 for one in self.samples) or len(set(self.samples)) < len(self.samples))
            and "distinct sample numbers from 0",
            "diffusion_steps_end": end > steps and f"at most generate.diffusion_steps, which is {steps}",
            "guidance_interval": (len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1)
            and "two shares in ascending order, e.g. [0.2, 0.8]",
        }
        for name, expected in wrong.items():
            if expected:
                yield name, f"generate.{name} is {getattr(self, name)}, expected {expected}"
        if self.ema_decay and not self.ema:
            about = "which selects the raw weights; reset one of them"
            yield "ema_decay", f"generate.ema_decay is {self.ema_decay:g}, but generate.ema is false, {about}"
