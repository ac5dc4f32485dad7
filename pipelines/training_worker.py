"""What each Ray Train worker runs: its micro-batches of every global batch, the optimizer step, metrics and checkpoints."""

import contextlib
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from mar_model.checkpoint import AVERAGE, WEIGHTS, load_optimizer, load_weights, read_state
from mar_model.config import MARConfig
from mar_model.diffusion import TokenLoss
from mar_model.ema import WeightAverage
from mar_model.mar import MAR, TrainingDraws
from mar_model.recipe import BANDS, band_sums, initial_weights, learning_rate, parameter_groups
from mar_model.tokenizers import sample_posterior
from pipelines import storage
from pipelines.checkpoints import newest_checkpoint, write_checkpoint
from pipelines.cluster import ClusterSettings, default_device, use_threads
from pipelines.latents import LatentCache, Manifest
from pipelines.metrics_log import CHECKPOINTED
from pipelines.micro_batches import MicroBatches
from pipelines.precision import autocast
from pipelines.progress import MetricsChannel

if TYPE_CHECKING:
    from pipelines.training import TrainSettings


@dataclass(frozen=True)
class TrainingJob:
    """All that a worker needs to know."""

    model: MARConfig
    train: "TrainSettings"
    cache: LatentCache
    tokenizer_path: str
    seed: int
    cluster: ClusterSettings
    channel: MetricsChannel


def train_worker(loop_config: dict[str, TrainingJob]) -> None:
    """The training loop of one worker, from the newest checkpoint that verifies to `train.images`."""
    import ray.train

    job = loop_config["job"]
    train, config, seed = job.train, job.model, job.seed
    context = ray.train.get_context()
    worker, workers = context.get_world_rank(), context.get_world_size()
    use_threads(job.cluster)
    device = default_device()
    cache = job.cache
    normalise = Normalisation(cache.manifest, device)

    with torch.random.fork_rng():
        torch.manual_seed(initial_weights(seed))
        model = MAR(config).to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, train.weight_decay), lr=train.learning_rate, betas=(train.beta1, train.beta2), fused=True
    )
    average = WeightAverage(model, train.ema_decay, train.ema_warmup)
    images_seen = step = 0
    intervals: deque[dict[str, float]] = deque(maxlen=CHECKPOINTED)
    newest = newest_checkpoint(train.path)
    if newest is not None:
        directory = storage.local_directory(newest)
        state = read_state(directory)
        load_weights(model, load_file(directory / WEIGHTS))
        average.load(load_file(directory / AVERAGE))
        load_optimizer(directory, model, optimizer)
        images_seen, step = state["images_seen"], state["step"]
        intervals.extend(state["intervals"])

    distributed = torch.nn.parallel.DistributedDataParallel(model) if workers > 1 else model
    micro_batches = MicroBatches(
        cache, config, batch=train.batch, micro_batch=train.micro_batch, flip=train.flip, seed=seed, worker=worker, workers=workers,
        shuffle_window=train.shuffle_window,
    )  # fmt: skip
    interval = Interval(device)
    model.train()
    for share in micro_batches.from_images(images_seen):
        if images_seen >= train.images:
            break
        rate = learning_rate(images_seen, train.learning_rate, train.warmup_images, train.schedule, train.schedule_images)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = train.batch * share.masked * config.diffusion_repeats  # of the global batch: losses are summed, then divided once
        for index, micro_batch in enumerate(share.micro_batches):
            last = index == len(share.micro_batches) - 1
            with contextlib.nullcontext() if last or workers == 1 else distributed.no_sync():  # type: ignore[operator]
                latents = normalise(micro_batch.moments, micro_batch.posterior_noise)
                draws = TrainingDraws(*(one.to(device, non_blocking=True) for one in micro_batch.draws))
                torch.manual_seed(micro_batch.dropout_seed)
                with autocast(train.precision, device):
                    loss, timesteps = distributed(latents, micro_batch.labels.to(device), share.masked, draws)
                (loss.total.sum() * (workers / tokens)).backward()  # DDP divides the summed gradients by the workers
                interval.add(loss, timesteps)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model, step)
        images_seen, step = images_seen + train.batch, step + 1
        interval.steps(train.batch, norm)

        ended = images_seen >= train.images
        if ended or _crosses(images_seen, train.batch, train.log_images):
            row = interval.close(workers, micro_batches.seconds_waited)
            micro_batches.seconds_waited = 0.0
            if worker == 0:
                parameters = sum(one.numel() for one in model.parameters())
                intervals.append({"images_seen": images_seen, **row, "learning_rate": rate, "parameters": parameters})
                job.channel.send(intervals[-1])
        if ended or _crosses(images_seen, train.batch, train.checkpoint_images):
            saved = None
            if worker == 0:
                progress = {"images_seen": images_seen, "step": step, "intervals": list(intervals)}
                saved = write_checkpoint(job, cache, model, average, optimizer, progress)
            ray.train.report(
                {"images_seen": images_seen},
                checkpoint=ray.train.Checkpoint(saved) if saved else None,
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            )


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
        latents = sample_posterior(moments.to(self.device, torch.float32), noise.to(self.device))
        return (latents - self.mean) / self.std


class Interval:
    """Sums over the steps between two lines of metrics; nothing is read from the device until the line is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros(2, device=self.device)
        self._bands = torch.zeros(2, BANDS, device=self.device)
        self._norm = torch.zeros(1, device=self.device)
        self._images = self._steps = 0
        self._began = time.perf_counter()

    def add(self, loss: TokenLoss, timesteps: Tensor) -> None:
        """One micro-batch."""
        self._loss[0] += loss.total.detach().sum()
        self._loss[1] += loss.total.numel()
        self._bands += band_sums(loss.mse, timesteps)

    def steps(self, images: int, gradient_norm: Tensor) -> None:
        """One optimizer step over `images` images of the global batch."""
        self._images += images
        self._steps += 1
        self._norm += gradient_norm.detach()

    def close(self, workers: int, seconds_waited: float) -> dict[str, float]:
        """The interval's line, summed over all workers (every worker must call it), and a new interval."""
        totals = torch.cat([self._loss, self._bands.flatten()])
        if workers > 1:
            torch.distributed.all_reduce(totals)
        values = totals.tolist()
        seconds = time.perf_counter() - self._began
        row = {"loss": values[0] / values[1]}
        for band in range(BANDS):
            row[f"loss_band_{band}"] = values[2 + band] / max(values[2 + BANDS + band], 1.0)
        row["gradient_norm"] = float(self._norm) / self._steps
        row["images_per_second"] = self._images / seconds
        row["data_wait_share"] = seconds_waited / seconds
        self._reset()
        return row
