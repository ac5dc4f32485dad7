"""Stage *train*: MAR on a latent cache with Ray Train."""

import contextlib
import importlib.metadata
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mar_model.checkpoint import AVERAGE, STATE, WEIGHTS, load_optimizer, load_weights, read_state, save_checkpoint
from mar_model.config import Architecture, MARConfig
from mar_model.diffusion import TokenLoss
from mar_model.ema import WeightAverage
from mar_model.mar import MAR, TrainingDraws
from mar_model.recipe import BANDS, band_sums, initial_weights, learning_rate, parameter_groups
from mar_model.tokenizers import sample_posterior
from pipelines import storage
from pipelines.caching import CacheSettings
from pipelines.cluster import ClusterSettings, cluster_resources, default_device, use_threads
from pipelines.errors import UserError
from pipelines.latents import LatentCache, Manifest
from pipelines.micro_batches import MicroBatches
from pipelines.precision import autocast
from pipelines.progress import MetricsChannel
from pipelines.settings import identity, identity_of, operational
from pipelines.stage import Stage
from pipelines.tokenizing import TokenizerSettings

logger = logging.getLogger(__name__)


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


LOSS_COLUMNS = ("loss", *(f"loss_band_{band}" for band in range(BANDS)))


def train(
    tokenizer: TokenizerSettings, cache: CacheSettings, model: Architecture, train: TrainSettings, seed: int, stage: Stage
) -> dict[str, Any]:
    """Train `model` on the cache at `cache.path` until `train.images` are seen, going on from the newest checkpoint that verifies.

    Returns the summary: images_seen, loss and its bands over the last interval, images_per_second, parameters, checkpoint.
    Raises UserError for a missing cache, an output of another identity, or a cluster too small for `train.workers`.
    """
    identity = training_identity(cache, model, train, seed)
    summary = stage.begin(train.path, identity, enough=lambda found: found["images_seen"] >= train.images)
    if summary is not None:
        return summary
    resumed = newest_checkpoint(train.path)
    first = read_state(storage.local_directory(resumed))["images_seen"] if resumed else 0
    stage.say(f"going on from {resumed} ({first:,} images seen)" if resumed else f"from the start; checkpoints in {train.path}/checkpoints")
    log = MetricsLog(storage.join(train.path, "metrics.jsonl"), first)
    with stage.progress(train.images, done=first) as bar:

        def on_metrics(row: dict[str, Any]) -> None:
            log.add(row)
            bar.update(row["images_seen"], loss=row["loss"], waiting_for_data=row["data_wait_share"])
            stage.log({name: value for name, value in row.items() if name != "images_seen"}, step=row["images_seen"])

        summary = fit(tokenizer, cache, model, train, seed, stage.cluster, on_metrics)
    log.write()
    summary["restarts_from"] = [first, *summary.get("restarts_from", [])] if first else summary.get("restarts_from", [])
    return stage.complete(train.path, identity, summary)


def training_identity(cache: CacheSettings, model: Architecture, train: TrainSettings, seed: int) -> dict[str, Any]:
    """What decides the weights that training ends with, apart from its length."""
    return {**identity_of(model=model, train=train, seed=seed), "cache.digest": LatentCache(cache.path).digest}


def fit(
    tokenizer: TokenizerSettings,
    cache: CacheSettings,
    model: Architecture,
    train: TrainSettings,
    seed: int,
    cluster: ClusterSettings,
    on_metrics: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The Ray Train run itself, untracked: `on_metrics` gets a row an interval (images_seen, loss, …). Returns a summary."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    if storage.is_local(train.path):
        train = replace(train, path=str(Path(train.path).resolve()))
    config = model_config(model, LatentCache(cache.path))
    _check_batches(train, cluster)
    channel = MetricsChannel()
    last: dict[str, Any] = {}

    def keep_last(row: dict[str, Any]) -> None:
        last.update(row)
        on_metrics(row)

    # Ray's own list of checkpoints is not written atomically, and can lag behind: we go by what is on disk and verifies
    storage.delete(storage.join(train.path, "checkpoints", "checkpoint_manager_snapshot.json"))
    gpus = cluster.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "tokenizer": tokenizer, "cache": cache, "model": config, "train": train, "seed": seed, "cluster": cluster, "channel": channel,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.workers, use_gpu=gpus > 0, resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})}
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=train.path,
            failure_config=ray.train.FailureConfig(max_failures=train.failures),
        ),
    )  # fmt: skip
    with channel.listening(keep_last):
        trainer.fit()
    checkpoint = newest_checkpoint(train.path)
    return {
        "images_seen": last.get("images_seen", train.images),
        **{name: last[name] for name in (*LOSS_COLUMNS, "images_per_second", "data_wait_share", "parameters") if name in last},
        "workers": train.workers,
        "checkpoint": checkpoint,
    }


def model_config(model: Architecture, cache: LatentCache) -> MARConfig:
    """The model's whole configuration: what was chosen, and what the cache determines. Raises UserError where they don't fit."""
    manifest = cache.manifest
    try:
        return MARConfig(
            **asdict(model),
            latent_size=manifest.latent_size,
            latent_channels=manifest.latent_channels,
            classes=len(manifest.class_names),
        )
    except ValueError as error:
        raise UserError(f"section model does not fit the cache at {cache.path}: {error}") from error


def _check_batches(train: TrainSettings, cluster: ClusterSettings) -> None:
    micro_batches = train.batch // train.micro_batch
    if train.batch % train.micro_batch:
        raise UserError(f"train.batch is {train.batch}, expected a multiple of train.micro_batch, {train.micro_batch}")
    if micro_batches < train.workers:
        raise UserError(
            f"train.workers is {train.workers}, but a batch of {train.batch} has only {micro_batches} micro-batches of "
            f"{train.micro_batch}: expected at least one a worker; lower train.workers or train.micro_batch"
        )
    cpus, gpus = cluster_resources()
    if train.workers > cpus or train.workers * cluster.gpus_per_worker > gpus:
        raise UserError(
            f"train.workers is {train.workers}, each with 1 CPU and {cluster.gpus_per_worker:g} GPU, but the cluster has {cpus:g} CPUs "
            f"and {gpus:g} GPUs; lower train.workers, or join a larger cluster with cluster.address"
        )


def train_worker(job: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train

    train: TrainSettings = job["train"]
    config: MARConfig = job["model"]
    seed: int = job["seed"]
    context = ray.train.get_context()
    worker, workers = context.get_world_rank(), context.get_world_size()
    use_threads(job["cluster"])
    device = default_device()
    cache = LatentCache(job["cache"].path)
    normalise = Normalisation(cache.manifest, device)

    with torch.random.fork_rng():
        torch.manual_seed(initial_weights(seed))
        model = MAR(config).to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, train.weight_decay), lr=train.learning_rate, betas=(train.beta1, train.beta2), fused=True
    )
    average = WeightAverage(model, train.ema_decay, train.ema_warmup)
    images_seen = step = 0
    newest = newest_checkpoint(train.path)
    if newest is not None:
        directory = storage.local_directory(newest)
        state = read_state(directory)
        load_weights(model, load_file(directory / WEIGHTS))
        average.weights = {name: value.to(device) for name, value in load_file(directory / AVERAGE).items()}
        load_optimizer(directory, model, optimizer)
        images_seen, step = state["images_seen"], state["step"]

    distributed = torch.nn.parallel.DistributedDataParallel(model) if workers > 1 else model
    micro_batches = MicroBatches(
        cache, config, batch=train.batch, micro_batch=train.micro_batch, flip=train.flip, seed=seed, worker=worker, workers=workers
    )
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
                job["channel"].send({"images_seen": images_seen, **row, "learning_rate": rate, "parameters": parameters})
        if ended or _crosses(images_seen, train.batch, train.checkpoint_images):
            saved = None
            if worker == 0:
                saved = write_checkpoint(train, model, average, optimizer, job, cache, images_seen, step)
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


def write_checkpoint(
    train: TrainSettings,
    model: MAR,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    job: dict[str, Any],
    cache: LatentCache,
    images_seen: int,
    step: int,
) -> str:
    """Publish `checkpoints/images-…` whole or not at all, then drop the oldest beyond `train.checkpoints_kept`. Returns its path."""
    manifest = cache.manifest
    state = {
        "images_seen": images_seen,
        "step": step,
        "seed": job["seed"],
        "code_version": importlib.metadata.version("mar-ray"),
        "train": asdict(train),
        "cache_digest": cache.digest,
        "tokenizer": {"path": job["tokenizer"].path, "digest": manifest.tokenizer["digest"]},
        "class_names": manifest.class_names,
        "image_size": manifest.image_size,
        **{name: getattr(manifest, name) for name in ("latent_mean", "latent_std", "latent_min", "latent_max")},
    }
    folder = storage.join(train.path, "checkpoints")
    path = storage.join(folder, f"images-{images_seen:012d}")
    scratch = str(Path(folder)) if storage.is_local(folder) else None
    if scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".writing-") as temporary:
        save_checkpoint(Path(temporary) / "checkpoint", model, average.weights, state, optimizer)
        storage.publish_directory(Path(temporary) / "checkpoint", path, last=STATE)
    for name in _checkpoint_names(train.path)[: -train.checkpoints_kept]:
        storage.delete(storage.join(folder, name))
    return path


def _checkpoint_names(train_path: str) -> list[str]:
    names = storage.list_directory(storage.join(train_path, "checkpoints"))
    return [name for name in names if name.startswith("images-") and not name.endswith(".partial")]


def newest_checkpoint(train_path: str) -> str | None:
    """The newest checkpoint of a run whose files all match their digests; damaged ones are named in a warning and passed over."""
    for name in reversed(_checkpoint_names(train_path)):
        path = storage.join(train_path, "checkpoints", name)
        try:
            read_state(storage.local_directory(path))
        except ValueError as error:
            logger.warning("checkpoint passed over: %s", error)
            continue
        return path
    return None


class MetricsLog:
    """`metrics.jsonl`: one line an interval. A resumed run drops the lines after its checkpoint before it goes on."""

    WRITE_SECONDS = 5.0

    def __init__(self, path: str, images_seen: int) -> None:
        self.path = path
        lines = storage.read_bytes(path).decode().splitlines() if storage.exists(path) else []
        self.rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if row["images_seen"] <= images_seen]
        self._written = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Take in a row; rows that a restarted worker group repeats replace those of the lost one."""
        self.rows = [one for one in self.rows if one["images_seen"] < row["images_seen"]]
        self.rows.append(row)
        if time.monotonic() - self._written > self.WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        storage.write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self._written = time.monotonic()
