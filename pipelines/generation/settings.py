"""Section `generate` of the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pipelines.runtime.settings import Count, NonNegative, Share, Whole, identity, operational

# of the published schedule, respaced for generation
DiffusionSteps = Annotated[int, Field(ge=1, le=1000, description="a number above 0, 1000 or fewer")]


@dataclass
class GenerateSettings:
    """Section `generate`. Sample i depends only on (seed, i), not on batch size or worker."""

    path: str = operational("runs/mar/samples", "directory of the samples: shards/, images/, samples.png")
    checkpoint: str = operational("", "checkpoint directory or released .pth; empty: the newest checkpoint in train.path")
    images: Count = identity(64, "number of images to draw; sample i has the label labels[i mod len(labels)]")
    labels: list[int | str] = identity(help="class numbers or names, used in turn; empty: all classes in turn", factory=list)
    samples: list[int] = identity(help="numbers of the samples to draw; empty: 0 … images − 1", factory=list)
    ar_steps: Count = identity(64, "autoregressive steps")
    diffusion_steps: DiffusionSteps = identity(100, "denoising steps per token")
    guidance: NonNegative = identity(3.0, "classifier-free guidance scale; 1 is off")
    guidance_schedule: Literal["linear", "constant"] = identity("linear", "linear (grows as the image fills) or constant")
    temperature: NonNegative = identity(1.0, "factor on the noise that each denoising step adds")
    sampler: Literal["ancestral", "ddim"] = identity("ancestral", "ancestral (as published) or ddim")
    eta: Share = identity(0.0, "noise of ddim: 0 none, 1 as in the posterior")
    limit_x0: bool = identity(True, "clamp each predicted clean token to the range of the cache (off: as in the published sampler)")
    diffusion_steps_end: Whole = identity(0, "fast: denoising steps at the last AR step, decreasing from diffusion_steps; 0: off")
    reuse_steps: Whole = identity(0, "fast: number of AR steps that reuse features after each complete step; 0: off")
    guidance_interval: list[float] = identity(
        help="fast: interval of the noise schedule (0 clean, 1 noise) with guidance; [0, 1]: off", factory=lambda: [0.0, 1.0]
    )
    image: str = operational("", "complete this image: draw the masked area, keep the rest")
    mask: str = operational("", "mask of the image's size: white is drawn, black is kept")
    keep_pixels: bool = identity(True, "completion: copy the image's pixels where the mask is black (off: decoded pixels everywhere)")
    ema: bool = identity(True, "use the moving average of the weights")
    ema_decay: NonNegative = identity(0.0, "decay of the average to use, if train.ema_decays has several; 0: that of train.ema_decay")
    precision: Literal["auto", "bf16", "float32"] = identity(
        "auto", "precision of matrix products: auto, bf16 or float32; the sampler's state is always float32"
    )
    compile: bool = identity(False, "torch.compile the model's blocks: takes minutes once, then faster")
    batch: Count = operational(64, "images per batch and per shard")
    actors: Count = operational(1, "number of actors, each with a copy of the model")
    cuda_graph: bool = operational(False, "on a GPU: capture the denoising loop in CUDA graphs")
    film: bool = operational(False, "write film.webp, an animation of the samples over the autoregressive steps")

    def relations(self) -> Iterator[tuple[str, str]]:
        """(field, error message) for values that contradict each other."""
        steps, end, interval = self.diffusion_steps, self.diffusion_steps_end, self.guidance_interval
        wrong = {
            "labels": any(isinstance(label, int) and label < 0 for label in self.labels) and "class numbers from 0",
            "samples": (any(number < 0 for number in self.samples) or len(set(self.samples)) < len(self.samples))
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
