"""Section `train` of the configuration, and the names of the metrics that training logs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mar_model.training.recipe import BANDS
from pipelines.runtime.settings import Count, NonNegative, Positive, ShareBelowOne, Whole, identity, operational


@dataclass
class TrainSettings:
    """Section `train`. Progress is counted in images seen; the defaults are the published recipe (batch 2048)."""

    path: str = operational("runs/mar/train", "directory of the run: checkpoints/, metrics.jsonl, summary.json")
    init_from: str = operational("", "fine-tuning: a checkpoint directory, or a released .pth, to begin with; empty: random weights")
    images: Count = operational(1_281_167 * 400, "images seen when training ends")
    batch: Count = identity(2048, "images a step, over all workers")
    micro_batch: Count = identity(128, "images a forward pass: the unit of randomness, dealt out to the workers")
    learning_rate: Positive = identity(8e-4, "peak learning rate (published: 1e-4 · batch / 256)")
    schedule: Literal["constant", "cosine"] = identity(
        "constant", "constant or cosine (to zero at train.schedule_images), after the warm-up"
    )
    schedule_images: Whole = identity(0, "images at which the cosine schedule reaches zero (cosine only)")
    warmup_images: Whole = identity(1_281_167 * 100, "images of linear warm-up")
    weight_decay: NonNegative = identity(0.02, "AdamW weight decay (none on biases, norms and the denoiser)")
    beta1: ShareBelowOne = identity(0.9, "AdamW beta 1")
    beta2: ShareBelowOne = identity(0.95, "AdamW beta 2")
    gradient_clip: Positive = identity(3.0, "largest gradient norm")
    ema_decay: ShareBelowOne = identity(0.9999, "decay of the weights' moving average, a step")
    ema_decays: list[float] = identity(help="decays of further averages, kept beside the first as ema-DECAY.safetensors", factory=list)
    ema_warmup: bool = identity(True, "start the average with a short memory: decay min(ema_decay, (1 + step) / (10 + step))")
    flip: bool = identity(True, "use the mirror image half of the time (off for digits and text)")
    shuffle_window: Whole = identity(0, "shards shuffled together, for a cache larger than cache.local_gb; 0: the whole cache")
    workers: Count = operational(2, "Ray Train workers")
    workers_min: Whole = operational(0, "fewest workers to go on with where the cluster has no room for more; 0: train.workers")
    strategy: Literal["ddp", "fsdp"] = operational("ddp", "ddp (every worker holds the model) or fsdp (each a part of every tensor)")
    precision: Literal["auto", "bf16", "float32"] = identity("auto", "auto (bf16 where the processor is fast at it), bf16 or float32")
    compile: bool = operational(False, "torch.compile on the blocks: minutes once, then quicker on a GPU")
    activation_checkpointing: bool = operational(
        False, "compute activations anew in the backward pass: a third more arithmetic, a fraction of the memory"
    )
    checkpoint_images: Count = operational(1_281_167, "images between checkpoints")
    checkpoints_kept: Count = operational(3, "newest checkpoints kept")
    keep_every_images: Whole = operational(0, "of every so many images one checkpoint is kept for good; 0: none")
    keep_best: str = operational("", "a metric, e.g. loss or validation_fid: the checkpoint where it was lowest is kept too")
    log_images: Count = operational(51_200, "images between lines of metrics")
    peak_tflops: NonNegative = operational(0.0, "peak of a worker's device (dense bf16), for the MFU; 0: the data sheet's, of a known GPU")
    validation_images: Whole = operational(0, "images between validations, which begin with a checkpoint; 0: none")
    validation_samples: Count = operational(1000, "samples that a validation draws and judges")
    failures: Whole = operational(8, "failures of workers, and starts that fail in a row, before the run gives up (notices not counted)")
    hang_seconds: Count = operational(600, "a worker that the others wait for this long counts as hung: the group starts again")
    nonfinite_limit: Count = operational(20, "steps in a row skipped for a loss or gradient that is not finite, before the run stops")

    def relations(self) -> Iterator[tuple[str, str]]:
        """(field, what is wrong) of values that do not fit each other."""
        micro_batches = self.batch // self.micro_batch
        if self.batch % self.micro_batch:
            yield "batch", f"train.batch is {self.batch}, expected a multiple of train.micro_batch, which is {self.micro_batch}"
        elif micro_batches < self.workers:
            about = f"train.batch {self.batch} has only {micro_batches} micro-batches"
            yield "workers", f"train.workers is {self.workers}, expected one micro-batch each or more: {about}"
        if self.schedule == "cosine" and not self.schedule_images:
            about = "the images at which the cosine schedule (train.schedule) reaches zero"
            yield "schedule_images", f"train.schedule_images is 0, expected {about}, e.g. {self.images}"
        decays = [self.ema_decay, *self.ema_decays]
        if len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            yield "ema_decays", f"train.ema_decays is {self.ema_decays}, expected shares below 1, none twice and none train.ema_decay's"


LOSS_COLUMNS = ("loss", *(f"loss_band_{band}" for band in range(BANDS)))

METRICS = (*LOSS_COLUMNS, "gradient_norm")  # what train.keep_best can name, beside a validation's
