"""What each Ray Train worker runs: its micro-batches of every global batch, the optimizer step, metrics and checkpoints."""

import posixpath
import time
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mar_model.checkpoints.checkpoint import AVERAGE, OPTIMIZER, STATE, WEIGHTS, average_file, load_optimizer, optimizer_state
from mar_model.config import MARConfig
from mar_model.files import read_tensors
from mar_model.mar import MAR
from mar_model.noise import to_device
from mar_model.tokenizers import sample_posterior
from mar_model.training.ema import WeightAverage
from mar_model.training.recipe import initial_weights, learning_rate, parameter_groups
from mar_model.training.step import OptimizerStep, Outcome, forward_backward
from mar_model.training.strategies import load_whole, strategy_of
from pipelines.caching.latent_format import Manifest
from pipelines.checkpoints.directory import TrainingState, images_of, last_validated, newest_checkpoint
from pipelines.checkpoints.writer import CheckpointWriter, HostMemory
from pipelines.runtime import storage
from pipelines.runtime.cluster.channel import Metrics
from pipelines.runtime.cluster.precision import autocast
from pipelines.runtime.cluster.workers import default_device, use_threads
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import nan_for_null, null_for_nan
from pipelines.training.data import GlobalBatch, MicroBatch, MicroBatches, owner_of
from pipelines.training.job import TrainingJob
from pipelines.training.metrics.intervals import Interval
from pipelines.training.metrics.log import CHECKPOINTED
from pipelines.training.metrics.prometheus import run_label
from pipelines.training.metrics.telemetry import Telemetry
from pipelines.training.settings import TrainSettings
from pipelines.training.supervision.channel import PREEMPTED, RESIZED
from pipelines.training.supervision.messages import PassedOver, Started
from pipelines.training.supervision.watchdog import PATIENCE, Watchdog

if TYPE_CHECKING:
    from ray.train import ValidationTaskConfig


def train_worker(loop_config: dict[str, TrainingJob]) -> None:
    """The training loop of one worker, from the newest checkpoint that verifies to `train.images`, or until asked to end."""
    import ray.train

    job = loop_config["job"]
    context = ray.train.get_context()
    use_threads(job.cluster)
    node = context.get_local_rank(), context.get_local_world_size()
    Training(job, context.get_world_rank(), context.get_world_size(), node).run()


class Training:
    """One worker's part of a run."""

    def __init__(self, job: TrainingJob, worker: int, workers: int, node: tuple[int, int]) -> None:
        """`node`: this worker's number among those of its node, and how many these are."""
        self.job, self.train, self.worker, self.workers = job, job.train, worker, workers
        self.began = time.time()
        train, config, seed = job.train, job.model, job.seed
        device = self.device = default_device()
        self.normalise = Normalisation(job.cache.manifest, device)

        model = made_model(config, train, seed).to(device)
        newest = self._newest()
        if job.start is not None and newest is None:
            model.load_state_dict(job.start.weights(model))
        self.model, self.strategy = model, strategy_of(train.strategy, model, workers, device, train.precision)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, train.weight_decay), lr=train.learning_rate, betas=(train.beta1, train.beta2), fused=True
        )
        self.averages = [WeightAverage(model, decay, train.ema_warmup) for decay in (train.ema_decay, *train.ema_decays)]
        self.images_seen = self.steps = 0  # steps that were taken, not skipped
        self.intervals: deque[dict[str, float]] = deque(maxlen=CHECKPOINTED)
        self.interval = Interval(device)
        self.telemetry = Telemetry(
            config, train.micro_batch, self.strategy.module, device, worker, workers, train.peak_tflops, run_label(train.path)
        )
        if newest is not None:
            self.resume(newest)
        self.resumed_at, self.validated = self.images_seen, last_validated(train.path, self.images_seen)
        self.resumed = time.time()

        self.micro_batches = MicroBatches(
            job.cache, config, batch=train.batch, micro_batch=train.micro_batch, flip=train.flip, seed=seed, worker=worker, workers=workers,
            shuffle_window=train.shuffle_window, checks=None if job.cache.local is None else node,  # copies are compared on each node
        )  # fmt: skip
        self.writer = CheckpointWriter(job.checkpointed(), job.channel.say, self.images_seen) if worker == 0 else None
        self.memory, self.seconds_saving = HostMemory(), 0.0
        self.asked = job.channel.watched() if worker == 0 else lambda: ""
        self.watchdog = Watchdog(f"worker {worker}", PATIENCE * train.hang_seconds, job.channel.say)
        self.ending = False  # a request to end has reached all workers
        self.skipped = 0  # steps in a row
        self.step = OptimizerStep(
            model, self.optimizer, self.averages, self.strategy, train.gradient_clip, train.batch // train.micro_batch, workers, requests=2
        )

    def _newest(self) -> str | None:
        """The newest checkpoint that verifies; the first worker looks for it."""
        from ray.train import collective

        channel = self.job.channel
        found = newest_checkpoint(self.train.path, lambda text: channel.send(PassedOver(text))) if self.worker == 0 else None
        newest: str | None = collective.broadcast_from_rank_zero(found)
        return newest

    def resume(self, checkpoint: str) -> None:
        """Go on from this checkpoint."""
        directory = storage.local_directory(checkpoint)
        state = storage.read_json(storage.join(checkpoint, STATE), TrainingState)
        load_whole(self.strategy, self.model.state_dict(), read_tensors(directory / WEIGHTS))
        for file, average in zip(self._average_files(), self.averages, strict=True):
            load_whole(self.strategy, average.weights, read_tensors(directory / file))
        load_optimizer(directory, self.model, self.optimizer, self.strategy.place)
        self.images_seen, self.steps = state["images_seen"], state["step"]
        self.intervals.extend(map(nan_for_null, state["intervals"]))
        self.interval.go_on(state["interval"], self.worker)

    def run(self) -> None:
        """Steps until `train.images` are seen or the workers are asked to end; then the last checkpoint."""
        train, first = self.train, True
        self.model.train()
        with self.watchdog:
            for share in self.micro_batches.from_images(self.images_seen):
                if self.images_seen >= train.images or self.ending:
                    break
                if first:
                    self._warm_up(share)
                self._step(share)
                if first and self.worker == 0:
                    self.job.channel.send(Started(self.images_seen, self.workers, self.began, self.resumed, time.time()))
                first = False
                ended = self.images_seen >= train.images
                if ended or _crosses(self.images_seen, train.batch, train.log_images):
                    self._log()
                if not ended and _crosses(self.images_seen, train.batch, train.checkpoint_images):
                    self._checkpoint()
                self.watchdog.stepped()
        self._end()

    def _warm_up(self, share: GlobalBatch) -> None:
        """A pass of which nothing stays: DDP lays out its buckets anew after the first, and the order of its sums with them, so that
        without this a resumed run's first step would not be bit by bit that of the run that was never interrupted."""
        if self.workers > 1 and not self.strategy.sharded:
            self._backward(share, share.micro_batches[0], last=True)
            self.optimizer.zero_grad(set_to_none=True)

    def _step(self, share: GlobalBatch) -> None:
        train = self.train
        rate = learning_rate(self.images_seen, train.learning_rate, train.warmup_images, train.schedule, train.schedule_images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        unsound = torch.zeros(train.batch // train.micro_batch, device=self.device)
        passes = list(zip(self.micro_batches.share, share.micro_batches, strict=True))
        most = -(-train.batch // train.micro_batch // self.workers) if self.strategy.sharded else len(passes)
        for index, micro_batch in passes[:-1]:
            unsound[index] = self._backward(share, micro_batch, counted=True)
        index, micro_batch = passes[-1]
        unsound[index] = self._backward(share, micro_batch, last=len(passes) == most, counted=True)
        if len(passes) < most:  # sharded workers gather their blocks together: who has one pass less joins in, and adds nothing
            self._backward(share, micro_batch, last=True)
        self.telemetry.stepped(len(share.micro_batches), share.masked)
        self._settle()
        self.step(unsound, [bool(self.asked()), bool(self.writer and self.writer.written)])
        self.images_seen += train.batch
        self.interval.steps(train.batch, self.step.norm, self.step.stepped, rate)

    def _backward(self, share: GlobalBatch, micro_batch: MicroBatch, last: bool = False, counted: bool = False) -> Tensor:
        """Forward and backward of one micro-batch; whether its loss was not finite, 1 or 0 on the device. Gradients travel in the last
        pass of a step; those of one that is not counted are zero."""
        tokens = self.train.batch * share.masked * self.job.model.diffusion_repeats  # losses are summed, then divided once
        with self.strategy.micro_batch(last):
            latents = self.normalise(micro_batch.moments, micro_batch.posterior_noise)
            loss, timesteps, finite = forward_backward(
                self.strategy.module, latents, micro_batch.labels, share.masked, micro_batch.draws, micro_batch.dropout_seed,
                self.workers / tokens if counted else 0.0,  # gradients are averaged over the workers
                autocast(self.train.precision, self.device),
            )  # fmt: skip
        if counted:
            self.interval.add(loss, timesteps, finite)
        return finite.logical_not().float()

    def _settle(self) -> None:
        """Learn what became of the step before, and of the requests that travelled with it."""
        outcome = self.step.settle(self.steps)
        if outcome is None:
            return
        self.steps += outcome.stepped
        self.skipped = 0 if outcome.stepped else self.skipped + 1
        self.ending |= outcome.requests[0]
        if not outcome.stepped:
            self._tell_skipped(outcome)
        if outcome.requests[1]:
            self._report()

    def _tell_skipped(self, outcome: Outcome) -> None:
        """Say where the non-finite value came from. Raises UserError after `train.nonfinite_limit` in a row, with a checkpoint of
        before the first of them."""
        train, before = self.train, self.images_seen - self.train.batch
        if outcome.losses:
            index = outcome.losses[0]
            worker = owner_of(index, self.workers, train.batch // train.micro_batch)
            where = f"the loss of micro-batch {index} (worker {worker}, images {before + index * train.micro_batch:,} and on in the order)"
        else:
            where = f"the gradient of {outcome.gradient}" if outcome.gradient else "the gradient's norm"
        text = f"{where} is not finite in the step at {before:,} images: skipped ({self.skipped} in a row)"
        if self.worker == 0:
            self.job.channel.say(text)
        if self.skipped < train.nonfinite_limit:
            return
        sound = self.images_seen - self.skipped * train.batch
        self._save_last(sound)
        if self.workers > 1:
            torch.distributed.barrier()  # the others' error would end the group while the first worker still writes
        raise UserError(
            f"{text}, which is train.nonfinite_limit; the checkpoint at {sound:,} images is from before",
            remedy="start a run with another train.path from that checkpoint (train.init_from), with a lower train.learning_rate or "
            "train.precision=float32",
        )

    def _log(self) -> None:
        row = {"images_seen": float(self.images_seen), **self.interval.close(self.workers)}
        row = self.telemetry.close(row, self.micro_batches.seconds_waited, self.seconds_saving)
        self.micro_batches.seconds_waited = self.seconds_saving = 0.0
        if self.worker == 0:
            parameters = sum(one.numel() for one in self.model.parameters())
            self.intervals.append({**row, "images_seen": self.images_seen, "parameters": parameters})
            self.job.channel.send(Metrics(self.intervals[-1]))

    def _checkpoint(self) -> None:
        """Begin to write a checkpoint; the writer waits for the one before. While steps are skipped there is nothing new to keep."""
        self._settle()
        if self.skipped:
            return
        self._settle_checks()
        tensors, sums = self._copies(), self.interval.sums(self.workers)
        if self.writer is not None:
            self.writer.begin(tensors, self._progress(self.images_seen, sums))

    def _settle_checks(self) -> None:
        """Wait until the shards that the weights were made of are compared with their checksums: no checkpoint comes of a damaged one.
        Each worker waits for its share, and `Interval.sums` for all of them."""
        self.watchdog.rests()
        self.micro_batches.latents.settle_checks()

    def _save_last(self, images_seen: int) -> None:
        """Write the checkpoint that a run ends with, unless it is on disk; this waits until it is."""
        if images_seen == self.resumed_at:
            return
        self._settle_checks()
        tensors, sums = self._copies(), self.interval.sums(self.workers)
        if self.writer is None or self.writer.newest == images_seen:
            return
        if self.ending and self.asked() in (PREEMPTED, RESIZED):  # the group starts again: where this fails, from the one before
            self.writer.begin(tensors, self._progress(images_seen, sums))
            self.writer.wait()
        else:
            self.writer.finish(tensors, self._progress(images_seen, sums))

    def _end(self) -> None:
        """The last checkpoint, and the end that was asked for: Ray restarts a group that reports a pre-emption."""
        from ray.exceptions import RayActorError
        from ray.train import collective

        self._settle()
        self._save_last(self.images_seen)
        reason = collective.broadcast_from_rank_zero(self.asked() if self.ending else "")  # after the first worker has written
        self._report()
        if reason == RESIZED and self.worker == 0:
            self.job.channel.answer()
        if reason == PREEMPTED:
            raise RayActorError(error_msg=f"pre-empted, with a checkpoint at {self.images_seen:,} images", preempted=True)

    def _report(self) -> None:
        """Tell Ray Train of the newest checkpoint that is written; all workers do at the same step."""
        import ray.train

        written, validation = None, None
        if self.writer is not None and self.writer.written:
            name = posixpath.basename(self.writer.written.pop())
            self.writer.written.clear()
            store = ray.train.get_context().get_storage()
            written = ray.train.Checkpoint(posixpath.join(store.experiment_fs_path, name), store.storage_filesystem)
            validation = self._due_validation(name)
        ray.train.report(
            {"images_seen": self.images_seen},
            checkpoint=written,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            validation=validation or False,
        )

    def _due_validation(self, name: str) -> "ValidationTaskConfig | None":
        """What Ray Train is to do with the checkpoint of that name, where `train.validation_images` have gone by."""
        from ray.train import ValidationTaskConfig

        every, seen = self.train.validation_images, images_of(name)
        if not every or self.ending or seen // every <= self.validated // every:
            return None
        self.validated = seen
        return ValidationTaskConfig(fn_kwargs={"path": storage.join(self.train.path, "checkpoints", name)})

    def _progress(self, images_seen: int, sums: list[float]) -> dict[str, object]:
        lines = [null_for_nan(line) for line in self.intervals if line["images_seen"] <= images_seen]
        return {"images_seen": images_seen, "step": self.steps, "intervals": lines, "interval": sums}

    def _average_files(self) -> list[str]:
        return [AVERAGE, *(average_file(decay) for decay in self.train.ema_decays)]

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        """file → name → whole tensor in host memory, on the first worker; a sharded model is gathered from all of them."""
        if self.worker > 0 and not self.strategy.sharded:
            return {}
        self.watchdog.rests()
        began = time.perf_counter()
        files = {
            WEIGHTS: dict(self.model.state_dict()),
            **{file: average.weights for file, average in zip(self._average_files(), self.averages, strict=True)},
            OPTIMIZER: optimizer_state(self.model, self.optimizer),
        }
        if self.writer is not None:
            self.writer.wait()  # what it still writes lies in the same memory
        copies: dict[str, dict[str, Tensor]] = {file: {} for file in files}
        for file, tensors in files.items():
            for name, tensor in tensors.items():
                whole = self.strategy.whole(tensor.detach())
                if self.writer is not None:
                    copies[file][name] = self.memory.copy(f"{file} {name}", whole)
        self.memory.arrived()
        self.seconds_saving += time.perf_counter() - began
        return copies


def made_model(config: MARConfig, train: TrainSettings, seed: int) -> MAR:
    """The model that every worker makes, with the same weights, to be run as `train` says."""
    with torch.random.fork_rng():
        torch.manual_seed(initial_weights(seed))
        model = MAR(config)
    if train.compile:
        model.compile_blocks()
    if train.activation_checkpointing:
        model.recompute_activations()
    return model


def _crosses(images_seen: int, batch: int, every: int) -> bool:
    """Whether the step that ended at `images_seen` passed a multiple of `every` images."""
    return images_seen // every > (images_seen - batch) // every


class Normalisation:
    """Moments (B, 2C, H, W) and noise → normalised latents (B, C, H, W) float32 on the training device."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(manifest.latent_mean, device=device)[None, :, None, None]
        self.std = torch.tensor(manifest.latent_std, device=device)[None, :, None, None]

    def __call__(self, moments: Tensor, noise: Tensor) -> Tensor:
        latents = sample_posterior(to_device(moments, self.device).float(), to_device(noise, self.device))
        return (latents - self.mean) / self.std
