"""Section `train` of the configuration, and the names of the training metrics."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mar_model.training.recipe import BANDS
from pipelines.runtime.settings import Count, NonNegative, Positive, ShareBelowOne, Whole, identity, operational


@dataclass
class TrainSettings:
    """Section `train`. Progress is counted in images seen; the defaults are those of the published recipe (batch 2048)."""

    path: str = operational("runs/mar/train", "directory of the run: checkpoints/, metrics.jsonl, summary.json")
    init_from: str = operational("", "fine-tuning: checkpoint directory or released .pth with the initial weights; empty: random weights")
    images: Count = operational(1_281_167 * 400, "number of images seen at the end of training")
    batch: Count = identity(2048, "images per step, over all workers")
    micro_batch: Count = identity(128, "images per forward pass: the unit of randomness, distributed over the workers")
    learning_rate: Positive = identity(8e-4, "peak learning rate (published: 1e-4 · batch / 256)")
    schedule: Literal["constant", "cosine"] = identity(
        "constant", "constant or cosine (to zero at train.schedule_images), after the warm-up"
    )
    schedule_images: Whole = identity(0, "images at which the cosine schedule reaches zero (cosine only)")
    warmup_images: Whole = identity(1_281_167 * 100, "images of linear warm-up")
    weight_decay: NonNegative = identity(0.02, "AdamW weight decay (none on biases, norms and the denoiser)")
    beta1: ShareBelowOne = identity(0.9, "AdamW beta 1")
    beta2: ShareBelowOne = identity(0.95, "AdamW beta 2")
    gradient_clip: Positive = identity(3.0, "maximum gradient norm")
    ema_decay: ShareBelowOne = identity(0.9999, "decay of the weights' moving average per step")
    ema_decays: list[float] = identity(help="decays of additional averages, saved as ema-DECAY.safetensors", factory=list)
    ema_warmup: bool = identity(True, "start the average with a short memory: decay min(ema_decay, (1 + step) / (10 + step))")
    flip: bool = identity(True, "use the mirror image with probability 0.5 (off for digits and text)")
    shuffle_window: Whole = identity(0, "number of shards shuffled together, for a cache larger than cache.local_gb; 0: the whole cache")
    workers: Count = operational(2, "number of Ray Train workers")
    workers_min: Whole = operational(0, "minimum number of workers while the cluster has no resources for more; 0: train.workers")
    strategy: Literal["ddp", "fsdp"] = operational(
        "ddp", "ddp (every worker holds the model) or fsdp (parameters are sharded over the workers)"
    )
    precision: Literal["auto", "bf16", "float32"] = identity("auto", "auto (bf16 if the hardware supports it natively), bf16 or float32")
    compile: bool = operational(False, "torch.compile the model's blocks: takes minutes once, then faster on a GPU")
    activation_checkpointing: bool = operational(
        False, "recompute activations in the backward pass: a third more computation, a fraction of the memory"
    )
    checkpoint_images: Count = operational(1_281_167, "images between checkpoints")
    checkpoints_kept: Count = operational(3, "number of newest checkpoints to keep")
    keep_every_images: Whole = operational(0, "keep one checkpoint permanently after every so many images; 0: none")
    keep_best: str = operational("", "also keep the checkpoint with the lowest value of this metric, e.g. loss or validation_fid")
    log_images: Count = operational(51_200, "images between rows of metrics")
    peak_tflops: NonNegative = operational(0.0, "peak of a worker's device (dense bf16) for the MFU; 0: from the data sheet of a known GPU")
    validation_images: Whole = operational(0, "images between validations, each of a checkpoint; 0: none")
    validation_samples: Count = operational(1000, "number of samples per validation")
    failures: Whole = operational(
        8, "number of worker failures, or of consecutive failed starts, before the run ends (pre-emptions do not count)"
    )
    hang_seconds: Count = operational(600, "time after which a worker that the others wait for counts as hung, and the group is restarted")
    nonfinite_limit: Count = operational(20, "number of consecutive steps skipped for a non-finite loss or gradient before the run ends")

    def relations(self) -> Iterator[tuple[str, str]]:
        """(field, error message) for values that contradict each other."""
        micro_batches = self.batch // self.micro_batch
        if self.batch % self.micro_batch:
            yield "batch", f"train.batch is {self.batch}, expected a multiple of train.micro_batch, which is {self.micro_batch}"
        elif micro_batches < self.workers:
            about = f"train.batch {self.batch} has only {micro_batches} micro-batches"
            yield "workers", f"train.workers is {self.workers}, expected at most one per micro-batch: {about}"
        if self.schedule == "cosine" and not self.schedule_images:
            about = "the images at which the cosine schedule (train.schedule) reaches zero"
            yield "schedule_images", f"train.schedule_images is 0, expected {about}, e.g. {self.images}"
        decays = [self.ema_decay, *self.ema_decays]
        if len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            yield (
                "ema_decays",
                f"train.ema_decays is {self.ema_decays}, expected different shares below 1, and different from train.ema_decay",
            )


LOSS_COLUMNS = ("loss", *(f"loss_band_{band}" for band in range(BANDS)))

METRICS = (*LOSS_COLUMNS, "gradient_norm")  # valid values of train.keep_best, in addition to validation metrics
