"""What each Ray Train worker of stage *tokenize* runs: its share of every batch, then the figures and files of the result."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from mar_model.training.recipe import crosses, learning_rate
from pipelines.images.listing import ImageListing
from pipelines.images.reading import DecodedImages
from pipelines.runtime import storage
from pipelines.runtime.cluster.channel import Metrics
from pipelines.runtime.cluster.workers import default_device, use_threads
from pipelines.runtime.records import damaged
from pipelines.runtime.supervision.channel import PREEMPTED
from pipelines.runtime.supervision.messages import Started
from pipelines.runtime.supervision.watchdog import PATIENCE, Watchdog
from pipelines.tokenizing.directory import initial_weights
from pipelines.tokenizing.job import TokenizerJob
from pipelines.tokenizing.learning.batches import batches
from pipelines.tokenizing.learning.progress import AGAIN, PROGRESS, Progress, read_progress, save_progress
from pipelines.tokenizing.learning.training import Training
from pipelines.tokenizing.learning.workers import summed
from pipelines.tokenizing.result import HeldOut, diverged, write_result

WARMUP_SHARE = 0.05
LOG_LINES = 200  # a run


def tokenize_worker(loop_config: dict[str, TokenizerJob]) -> None:
    """Train from `progress.safetensors` (or from the start) to `tokenizer.images`, or until the workers are asked to stop; worker 0 writes
    the result."""
    import ray
    import ray.train

    job = loop_config["job"]
    context = ray.train.get_context()
    use_threads(job.cluster)
    run = Run(job, ray.get(job.listing), context.get_world_rank(), context.get_world_size())
    if run.train_to_the_end():
        run.write_result()


class Run:
    """One worker's part of a run."""

    def __init__(self, job: TokenizerJob, listing: ImageListing, worker: int, workers: int) -> None:
        self.began = time.time()
        self.job, self.settings, self.worker, self.workers = job, job.tokenizer, worker, workers
        self.device = default_device()
        self.images = DecodedImages(job.images, listing.train())
        self.held_out = HeldOut(job, listing)
        progress = read_progress(self.settings.path)
        initial = initial_weights(self.settings.init_from) if self.settings.init_from and progress is None else None
        self.training = Training(self.settings, job.seed, self.device, workers, initial)
        self.images_seen, self.curve, self.validations = 0, list[list[float]](), list[list[float]]()
        self.sums, self.steps = torch.zeros(len(self.training.names), device=self.device), 0  # since the last row of the curve
        if progress is not None:
            self._load(progress)
        self.training.distribute()
        self.first, self.resumed = self.images_seen, time.time()
        self.asked = job.channel.watched() if worker == 0 else lambda: ""
        self.watchdog = Watchdog(f"worker {worker}", PATIENCE * self.settings.hang_seconds, job.channel.say)
        self.rate = 0.0

    def _load(self, progress: Progress) -> None:
        try:
            self.training.load(progress.tensors)
        except (ValueError, LookupError) as error:
            raise damaged(storage.join(self.settings.path, PROGRESS), error, AGAIN) from error
        self.images_seen, self.curve, self.validations = progress.images_seen, progress.curve, progress.validations
        if self.worker == 0 and "interval.sums" in progress.tensors:  # the sums of all workers
            self.sums.copy_(progress.tensors["interval.sums"])
        if "interval.steps" in progress.tensors:
            self.steps = int(progress.tensors["interval.steps"])

    def train_to_the_end(self) -> bool:
        """Whether all images were seen; else the workers were asked to stop, and the progress is saved."""
        settings, side = self.settings, self.job.images.size // self.settings.stride
        latent = (settings.channels, side, side)
        asked, started = torch.zeros(1, device=self.device), time.perf_counter()
        self.training.tokenizer.train()
        with self.watchdog:
            for pixels, noise in batches(self.images, settings, latent, self.job.seed, self.images_seen, self.worker, self.workers):
                if self.images_seen == self.first:
                    self.training.warm_up(pixels, noise)
                self._step(pixels, noise)
                if self.images_seen == self.first + settings.batch and self.worker == 0:
                    self.job.channel.send(Started(self.images_seen, self.workers, self.began, self.resumed, time.time()))
                ended = self.images_seen >= settings.images
                stops = bool(asked) and not ended  # as it was asked before the last step, so that no step waits for the answer
                if ended or crosses(self.images_seen, settings.batch, max(settings.images // LOG_LINES, settings.batch)):
                    self._log((self.images_seen - self.first) / (time.perf_counter() - started))
                if settings.validation_images and not ended and crosses(self.images_seen, settings.batch, settings.validation_images):
                    self._validate()
                if ended or stops or crosses(self.images_seen, settings.batch, settings.checkpoint_images):
                    self._save()
                if stops:
                    break
                asked = summed(torch.tensor([float(bool(self.asked()))], device=self.device), self.workers)
                self.watchdog.stepped()
        self.seconds = time.perf_counter() - started
        if self.images_seen < settings.images:
            self._leave()
            return False
        return True

    def _step(self, pixels: Tensor, noise: Tensor) -> None:
        settings = self.settings
        warmup = int(WARMUP_SHARE * settings.images)
        self.rate = learning_rate(self.images_seen, settings.learning_rate, warmup, settings.schedule, settings.images)
        self.sums += self.training.step(pixels, noise, self.images_seen, self.rate)
        self.steps += 1
        self.images_seen += settings.batch

    def _log(self, speed: float) -> None:
        """Raises UserError where the loss is not finite."""
        means = (summed(self.sums, self.workers) / (self.steps * self.workers)).tolist()
        row: dict[str, float] = dict(zip(self.training.names, means, strict=True))
        if not math.isfinite(row["loss"]):
            raise diverged(f"loss {row['loss']} at {self.images_seen} images", self.settings)
        if self.training.codes:
            use = self.training.codes.use()
            row |= {"code_perplexity": use.perplexity, "codes_used": use.used}
        self.curve.append([self.images_seen, row["loss"]])
        row |= {"learning_rate": self.rate, "images_per_second": speed}
        self._send({name: value for name, value in row.items() if not math.isnan(value)})  # a term that has not begun
        self.sums.zero_()
        self.steps = 0

    def _validate(self) -> None:
        self.watchdog.rests()
        if self.worker == 0:
            with self.training.evaluated() as tokenizer:
                found = self.held_out.psnr(tokenizer)
            self.validations.append([self.images_seen, found])
            self._send({f"psnr_{self.held_out.part}": found})

    def _send(self, row: dict[str, Any]) -> None:
        if self.worker == 0:
            self.job.channel.send(Metrics({"images_seen": self.images_seen, **row}))

    def _save(self) -> None:
        self.watchdog.rests()
        sums = summed(self.sums, self.workers)
        if self.worker == 0:
            interval = {"interval.sums": sums.cpu(), "interval.steps": torch.tensor(self.steps)}
            save_progress(self.settings.path, self.training.tensors() | interval, self.images_seen, self.curve, self.validations)

    def _leave(self) -> None:
        """Stop as requested: Ray restarts a group that reports a pre-emption."""
        from ray.exceptions import RayActorError
        from ray.train import collective

        reason = collective.broadcast_from_rank_zero(self.asked())  # after rank 0 has written
        if reason == PREEMPTED:
            raise RayActorError(error_msg=f"pre-empted, with the progress at {self.images_seen:,} images saved", preempted=True)

    def write_result(self) -> None:
        """Of worker 0: the tokenizer, its figures and pictures."""
        if self.worker:
            return
        figures: dict[str, Any] = {"loss": self.curve[-1][1]}
        if self.images_seen > self.first:  # else a killed run had trained on all of them
            figures["images_per_second"] = round((self.images_seen - self.first) / self.seconds, 3)
        figures |= {"rejected": len(self.images.rejected), "loss_curve": self.curve}
        if self.validations:
            figures["validations"] = self.validations
        with self.training.evaluated() as tokenizer:
            write_result(self.job, tokenizer, self.held_out, figures)
