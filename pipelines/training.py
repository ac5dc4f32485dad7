"""Stage *train*: MAR on a latent cache with Ray Train."""

from dataclasses import dataclass

from pipelines.settings import identity, operational


@dataclass
class TrainSettings:
    """Section `train`. Progress is counted in images seen; the defaults are the published recipe (batch 2048)."""

    path: str = operational("runs/mar/train", "directory of the run: checkpoints/, metrics.jsonl, summary.json")
    images: int = operational(1_281_167 * 400, "images seen when training ends")
    batch: int = identity(2048, "images a step, over all workers")
    micro_batch: int = identity(128, "images a forward pass: the unit of randomness, dealt out to the workers")
    learning_rate: float = identity(8e-4, "peak learning rate (published: 1e-4 · batch / 256)")
    schedule: str = identity("constant", "constant or cosine (to zero at train.schedule_images), after the warm-up")
    schedule_images: int = identity(0, "images at which the cosine schedule reaches zero (cosine only)")
    warmup_images: int = identity(1_281_167 * 100, "images of linear warm-up")
    weight_decay: float = identity(0.02, "AdamW weight decay (none on biases, norms and the denoiser)")
    beta1: float = identity(0.9, "AdamW beta 1")
    beta2: float = identity(0.95, "AdamW beta 2")
    gradient_clip: float = identity(3.0, "largest gradient norm")
    ema_decay: float = identity(0.9999, "decay of the weights' moving average, a step")
    ema_warmup: bool = identity(True, "start the average with a short memory: decay min(ema_decay, (1 + step) / (10 + step))")
    flip: bool = identity(True, "use the mirror image half of the time (off for digits and text)")
    workers: int = operational(2, "Ray Train workers")
    precision: str = identity("auto", "auto (bf16 where the processor is fast at it), bf16 or float32")
    checkpoint_images: int = operational(1_281_167, "images between checkpoints")
    checkpoints_kept: int = operational(3, "newest checkpoints kept")
    log_images: int = operational(51_200, "images between lines of metrics")
    failures: int = operational(8, "restarts after failed workers before the run gives up")
