"""The training loop of a Ray Train worker: its micro-batches of each global batch, the optimizer step, metrics and checkpoints."""

import posixpath
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mar_model.training.recipe import crosses, learning_rate
from mar_model.training.step import OptimizerStep, Outcome, forward_backward
from pipelines.checkpoints.directory import images_of, last_validated, newest_checkpoint
from pipelines.checkpoints.writer import CheckpointWriter
from pipelines.runtime import storage
from pipelines.runtime.cluster.channel import Metrics
from pipelines.runtime.cluster.precision import autocast
from pipelines.runtime.cluster.workers import default_device, use_threads
from pipelines.runtime.errors import UserError
from pipelines.runtime.supervision.channel import PREEMPTED, RESIZED
from pipelines.runtime.supervision.messages import PassedOver, Started
from pipelines.runtime.supervision.watchdog import PATIENCE, Watchdog
from pipelines.training.data import GlobalBatch, MicroBatch, MicroBatches, Normalization, owner_of
from pipelines.training.job import TrainingJob
from pipelines.training.metrics.prometheus import run_label
from pipelines.training.metrics.telemetry import Telemetry
from pipelines.training.state import WorkerState

if TYPE_CHECKING:
    from ray.train import ValidationTaskConfig


def train_worker(loop_config: dict[str, TrainingJob]) -> None:
    """The training loop of one worker, from the newest valid checkpoint to `train.images`, or until it is asked to stop."""
    import ray.train

    job = loop_config["job"]
    context = ray.train.get_context()
    use_threads(job.cluster)
    node = context.get_local_rank(), context.get_local_world_size()
    Training(job, context.get_world_rank(), context.get_world_size(), node).run()


class Training:
    """One worker's part of a run."""

    def __init__(self, job: TrainingJob, worker: int, workers: int, node: tuple[int, int]) -> None:
        """`node`: this worker's rank on its node, and the number of workers there."""
        self.job, self.train, self.worker, self.workers = job, job.train, worker, workers
        self.began = time.time()
        train, device = job.train, default_device()
        self.device, self.normalize = device, Normalization(job.cache.manifest, device)
        self.state = WorkerState(job, self._newest(), worker, workers, device)
        self.telemetry = Telemetry(
            job.model, train.micro_batch, self.state.strategy.module, device, worker, workers, train.peak_tflops, run_label(train.path)
        )
        self.resumed_at = self.state.images_seen
        self.validated = last_validated(train.path, self.resumed_at)
        self.resumed = time.time()

        self.micro_batches = MicroBatches(
            job.cache, job.model, batch=train.batch, micro_batch=train.micro_batch, flip=train.flip, seed=job.seed, worker=worker,
            workers=workers, shuffle_window=train.shuffle_window,
            checks=None if job.cache.local is None else node,  # local copies are verified on each node
        )  # fmt: skip
        self.writer = CheckpointWriter(job.checkpointed(), job.channel.say, self.state.images_seen) if worker == 0 else None
        self.asked = job.channel.watched() if worker == 0 else lambda: ""
        self.watchdog = Watchdog(f"worker {worker}", PATIENCE * train.hang_seconds, job.channel.say)
        self.ending = False  # all workers have received the request to stop
        self.skipped = 0  # consecutive steps
        state = self.state
        self.step = OptimizerStep(
            state.model, state.optimizer, state.averages, state.strategy, train.gradient_clip, train.batch // train.micro_batch, workers,
            requests=2,
        )  # fmt: skip

    def _newest(self) -> str | None:
        """The newest valid checkpoint, found by rank 0."""
        from ray.train import collective

        channel = self.job.channel
        found = newest_checkpoint(self.train.path, lambda text: channel.send(PassedOver(text))) if self.worker == 0 else None
        newest: str | None = collective.broadcast_from_rank_zero(found)
        return newest

    def run(self) -> None:
        """Train until `train.images` are seen or the workers are asked to stop; then write the last checkpoint."""
        train, first = self.train, True
        self.state.model.train()
        with self.watchdog:
            for share in self.micro_batches.from_images(self.state.images_seen):
                if self.state.images_seen >= train.images or self.ending:
                    break
                if first:
                    self._warm_up(share)
                self._step(share)
                if first and self.worker == 0:
                    self.job.channel.send(Started(self.state.images_seen, self.workers, self.began, self.resumed, time.time()))
                first = False
                ended = self.state.images_seen >= train.images
                if ended or crosses(self.state.images_seen, train.batch, train.log_images):
                    self._log()
                if not ended and crosses(self.state.images_seen, train.batch, train.checkpoint_images):
                    self._checkpoint()
                self.watchdog.stepped()
        self._end()

    def _warm_up(self, share: GlobalBatch) -> None:
        """Run a backward pass and discard its gradients. DDP rebuilds its buckets after the first pass, which changes the order of sums:
        without this, the first step of a resumed run would not be bit-identical to that of an uninterrupted run."""
        if self.workers > 1 and not self.state.strategy.sharded:
            self._backward(share, share.micro_batches[0], last=True)
            self.state.optimizer.zero_grad(set_to_none=True)

    def _step(self, share: GlobalBatch) -> None:
        train = self.train
        rate = learning_rate(self.state.images_seen, train.learning_rate, train.warmup_images, train.schedule, train.schedule_images)
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate
        unsound = torch.zeros(train.batch // train.micro_batch, device=self.device)
        passes = list(zip(self.micro_batches.share, share.micro_batches, strict=True))
        most = -(-train.batch // train.micro_batch // self.workers) if self.state.strategy.sharded else len(passes)
        for index, micro_batch in passes[:-1]:
            unsound[index] = self._backward(share, micro_batch, counted=True)
        index, micro_batch = passes[-1]
        unsound[index] = self._backward(share, micro_batch, last=len(passes) == most, counted=True)
        if len(passes) < most:  # all workers of a sharded model must run the same number of passes; this one adds nothing
            self._backward(share, micro_batch, last=True)
        self.telemetry.stepped(len(share.micro_batches), share.masked)
        self._settle()
        self.step(unsound, [bool(self.asked()), bool(self.writer and self.writer.written)])
        self.state.images_seen += train.batch
        self.state.interval.steps(train.batch, self.step.norm, self.step.stepped, rate)

    def _backward(self, share: GlobalBatch, micro_batch: MicroBatch, last: bool = False, counted: bool = False) -> Tensor:
        """Forward and backward of one micro-batch. Returns whether its loss was not finite, 1 or 0 on the device. The last pass of a step
        averages the gradients; the gradients of a pass that is not `counted` are zero."""
        tokens = self.train.batch * share.masked * self.job.model.diffusion_repeats  # losses are summed, then divided once
        with self.state.strategy.micro_batch(last):
            latents = self.normalize(micro_batch.moments, micro_batch.posterior_noise)
            loss, timesteps, finite = forward_backward(
                self.state.strategy.module, latents, micro_batch.labels, share.masked, micro_batch.draws, micro_batch.dropout_seed,
                self.workers / tokens if counted else 0.0,  # gradients are averaged over the workers
                autocast(self.train.precision, self.device),
            )  # fmt: skip
        if counted:
            self.state.interval.add(loss, timesteps, finite)
        return finite.logical_not().float()

    def _settle(self) -> None:
        """Read the outcome of the previous step, and of the requests that were reduced with it."""
        outcome = self.step.settle(self.state.steps)
        if outcome is None:
            return
        self.state.steps += outcome.stepped
        self.skipped = 0 if outcome.stepped else self.skipped + 1
        self.ending |= outcome.requests[0]
        if not outcome.stepped:
            self._tell_skipped(outcome)
        if outcome.requests[1]:
            self._report()

    def _tell_skipped(self, outcome: Outcome) -> None:
        """Report the origin of the non-finite value. Raises UserError after `train.nonfinite_limit` consecutive steps, with a checkpoint
        of the state before them."""
        train, before = self.train, self.state.images_seen - self.train.batch
        if outcome.losses:
            index = outcome.losses[0]
            worker = owner_of(index, self.workers, train.batch // train.micro_batch)
            where = f"the loss of micro-batch {index} (worker {worker}, images from position {before + index * train.micro_batch:,})"
        else:
            where = f"the gradient of {outcome.gradient}" if outcome.gradient else "the gradient's norm"
        text = f"{where} is not finite in the step at {before:,} images: skipped ({self.skipped} in a row)"
        if self.worker == 0:
            self.job.channel.say(text)
        if self.skipped < train.nonfinite_limit:
            return
        sound = self.state.images_seen - self.skipped * train.batch
        self._save_last(sound)
        if self.workers > 1:
            torch.distributed.barrier()  # an error in another worker would end the group while rank 0 is writing
        raise UserError(
            f"{text}, which is train.nonfinite_limit; the checkpoint at {sound:,} images precedes these steps",
            remedy="start a run with another train.path from that checkpoint (train.init_from), with a lower train.learning_rate or "
            "train.precision=float32",
        )

    def _log(self) -> None:
        row = {"images_seen": float(self.state.images_seen), **self.state.interval.close(self.workers)}
        row = self.telemetry.close(row, self.micro_batches.seconds_waited, self.state.seconds_copying)
        self.micro_batches.seconds_waited = self.state.seconds_copying = 0.0
        if self.worker == 0:
            parameters = sum(parameter.numel() for parameter in self.state.model.parameters())
            self.state.intervals.append({**row, "images_seen": self.state.images_seen, "parameters": parameters})
            self.job.channel.send(Metrics(self.state.intervals[-1]))

    def _checkpoint(self) -> None:
        """Start writing a checkpoint, after the previous one is written. While steps are skipped there is no new state to save."""
        self._settle()
        if self.skipped:
            return
        self._settle_checks()
        tensors, sums = self._copies(), self.state.interval.sums(self.workers)
        if self.writer is not None:
            self.writer.begin(tensors, self.state.progress(self.state.images_seen, sums))

    def _settle_checks(self) -> None:
        """Wait until all shards that were trained on are verified, so that no checkpoint depends on a damaged shard. Each worker waits for
        its share; `Interval.sums` synchronises the workers."""
        self.watchdog.rests()
        self.micro_batches.latents.settle_checks()

    def _save_last(self, images_seen: int) -> None:
        """Write the last checkpoint of a run, unless it is on disk, and wait for it."""
        if images_seen == self.resumed_at:
            return
        self._settle_checks()
        tensors, sums = self._copies(), self.state.interval.sums(self.workers)
        if self.writer is None or self.writer.newest == images_seen:
            return
        if self.ending and self.asked() in (PREEMPTED, RESIZED):  # the group restarts; if this fails, from the previous checkpoint
            self.writer.begin(tensors, self.state.progress(images_seen, sums))
            self.writer.wait()
        else:
            self.writer.finish(tensors, self.state.progress(images_seen, sums))

    def _end(self) -> None:
        """Write the last checkpoint and stop as requested: Ray restarts a group that reports a pre-emption."""
        from ray.exceptions import RayActorError
        from ray.train import collective

        self._settle()
        self._save_last(self.state.images_seen)
        reason = collective.broadcast_from_rank_zero(self.asked() if self.ending else "")  # after rank 0 has written
        self._report()
        if reason == RESIZED and self.worker == 0:
            self.job.channel.answer()
        if reason == PREEMPTED:
            raise RayActorError(error_msg=f"pre-empted, with a checkpoint at {self.state.images_seen:,} images", preempted=True)

    def _report(self) -> None:
        """Report the newest written checkpoint to Ray Train; all workers call this in the same step."""
        import ray.train

        written, validation = None, None
        if self.writer is not None and self.writer.written:
            name = posixpath.basename(self.writer.written.pop())
            self.writer.written.clear()
            store = ray.train.get_context().get_storage()
            written = ray.train.Checkpoint(posixpath.join(store.experiment_fs_path, name), store.storage_filesystem)
            validation = self._due_validation(name)
        ray.train.report(
            {"images_seen": self.state.images_seen},
            checkpoint=written,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            validation=validation or False,
        )

    def _due_validation(self, name: str) -> "ValidationTaskConfig | None":
        """Validation of the checkpoint of this name, if `train.validation_images` have passed since the last one; else None."""
        from ray.train import ValidationTaskConfig

        every, seen = self.train.validation_images, images_of(name)
        if not every or self.ending or seen // every <= self.validated // every:
            return None
        self.validated = seen
        return ValidationTaskConfig(fn_kwargs={"path": storage.join(self.train.path, "checkpoints", name)})

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        self.watchdog.rests()
        return self.state.copies(self.writer)
