"""Stage *train*: MAR on a latent cache with Ray Train."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mar_model.config import Architecture, MARConfig
from mar_model.training.recipe import BANDS
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.stage import CacheSettings
from pipelines.checkpoints.directory import TrainingState, forget_lost_attempts, newest_checkpoint, once, read_checkpoint
from pipelines.checkpoints.fine_tuning import Start, start_from
from pipelines.runtime import storage
from pipelines.runtime.cluster.connection import ClusterSettings, require_workers
from pipelines.runtime.cluster.interruption import finish_when_asked
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import identity, identity_of, operational
from pipelines.runtime.stage import IDENTITY, Stage, read_identity
from pipelines.tokenizing.stage import TokenizerSettings
from pipelines.training.divergence import diverged, skipped_steps
from pipelines.training.latent_dataset import LatentDataset
from pipelines.training.metrics_log import MetricsLog
from pipelines.training.supervision.channel import STOP, TrainingChannel
from pipelines.training.supervision.controller import Supervision, Trainer, ray_train_waits
from pipelines.training.telemetry import in_short
from pipelines.training.worker import TrainingJob, train_worker

if TYPE_CHECKING:
    from pipelines.evaluation.validation import Validation


@dataclass
class TrainSettings:
    """Section `train`. Progress is counted in images seen; the defaults are the published recipe (batch 2048)."""

    path: str = operational("runs/mar/train", "directory of the run: checkpoints/, metrics.jsonl, summary.json")
    init_from: str = operational("", "fine-tuning: a checkpoint directory, or a released .pth, to begin with; empty: random weights")
    images: int = operational(1_281_167 * 400, "images seen when training ends")
    batch: int = identity(2048, "images a step, over all workers")
    micro_batch: int = identity(128, "images a forward pass: the unit of randomness, dealt out to the workers")
    learning_rate: float = identity(8e-4, "peak learning rate (published: 1e-4 · batch / 256)")
    schedule: Literal["constant", "cosine"] = identity(
        "constant", "constant or cosine (to zero at train.schedule_images), after the warm-up"
    )
    schedule_images: int = identity(0, "images at which the cosine schedule reaches zero (cosine only)")
    warmup_images: int = identity(1_281_167 * 100, "images of linear warm-up")
    weight_decay: float = identity(0.02, "AdamW weight decay (none on biases, norms and the denoiser)")
    beta1: float = identity(0.9, "AdamW beta 1")
    beta2: float = identity(0.95, "AdamW beta 2")
    gradient_clip: float = identity(3.0, "largest gradient norm")
    ema_decay: float = identity(0.9999, "decay of the weights' moving average, a step")
    ema_decays: list[float] = identity(help="decays of further averages, kept beside the first as ema-DECAY.safetensors", factory=list)
    ema_warmup: bool = identity(True, "start the average with a short memory: decay min(ema_decay, (1 + step) / (10 + step))")
    flip: bool = identity(True, "use the mirror image half of the time (off for digits and text)")
    shuffle_window: int = identity(0, "shards shuffled together, for a cache larger than cache.local_gb; 0: the whole cache")
    workers: int = operational(2, "Ray Train workers")
    workers_min: int = operational(0, "fewest workers to go on with where the cluster has no room for more; 0: train.workers")
    strategy: Literal["ddp", "fsdp"] = operational("ddp", "ddp (every worker holds the model) or fsdp (each a part of every tensor)")
    precision: Literal["auto", "bf16", "float32"] = identity("auto", "auto (bf16 where the processor is fast at it), bf16 or float32")
    compile: bool = operational(False, "torch.compile on the blocks: minutes once, then quicker on a GPU")
    activation_checkpointing: bool = operational(
        False, "compute activations anew in the backward pass: a third more arithmetic, a fraction of the memory"
    )
    checkpoint_images: int = operational(1_281_167, "images between checkpoints")
    checkpoints_kept: int = operational(3, "newest checkpoints kept")
    keep_every_images: int = operational(0, "of every so many images one checkpoint is kept for good; 0: none")
    keep_best: str = operational("", "a metric, e.g. loss or validation_fid: the checkpoint where it was lowest is kept too")
    log_images: int = operational(51_200, "images between lines of metrics")
    peak_tflops: float = operational(0.0, "peak of a worker's device (dense bf16), for the MFU; 0: the data sheet's, of a known GPU")
    validation_images: int = operational(0, "images between validations, which begin with a checkpoint; 0: none")
    validation_samples: int = operational(1000, "samples that a validation draws and judges")
    failures: int = operational(8, "failures of workers, and starts that fail in a row, before the run gives up (notices not counted)")
    hang_seconds: int = operational(600, "a worker that the others wait for this long counts as hung: the group starts again")
    nonfinite_limit: int = operational(20, "steps in a row skipped for a loss or gradient that is not finite, before the run stops")


LOSS_COLUMNS = ("loss", *(f"loss_band_{band}" for band in range(BANDS)))
METRICS = (*LOSS_COLUMNS, "gradient_norm")  # what train.keep_best can name, beside a validation's
FIGURES = (  # of the last interval, kept in the summary
    *LOSS_COLUMNS, "images_per_second", "tflops_per_worker", "mfu", "data_wait_share", "communication_share", "checkpoint_share",
    "parameters",
)  # fmt: skip


def train(
    tokenizer: TokenizerSettings, cache: CacheSettings, model: Architecture, train: TrainSettings, seed: int, stage: Stage,
    validation: "Validation | None" = None, on_validation: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Train `model` on the cache at `cache.path` until `train.images` are seen, going on from the newest checkpoint that verifies.
    `on_validation` gets what each `validation` has found; without, none takes place (see `validating.train`).

    Returns the summary: images_seen, steps, steps_skipped (because they were not finite), loss and its bands over the last interval,
    images_per_second, parameters, checkpoint.
    Raises UserError for a missing cache, an output of another identity, or a cluster too small for `train.workers`.
    """
    train = replace(train, precision=resolved(train.precision, stage.cluster))
    latents = LatentCache(cache.path)
    start, begun = begun_with(train, model_config(model, latents), latents.manifest.class_names)
    identity = training_identity(cache, model, train, seed) | begun
    summary = stage.begin(train.path, identity, enough=lambda found: (found.get("images_seen") or 0) >= train.images)
    if summary is not None:
        return summary
    passed_over = once(stage.say)
    resumed = newest_checkpoint(train.path, passed_over)
    state: dict[str, Any] = read_checkpoint(resumed, TrainingState) if resumed else {"images_seen": 0, "intervals": []}
    first = int(state["images_seen"])
    stage.say(f"going on from {resumed} ({first:,} images seen)" if resumed else f"from the start; checkpoints in {train.path}/checkpoints")
    for line in start.describe(latents.manifest.class_names) if start and not resumed else ():
        stage.say(line)
    log = MetricsLog(storage.join(train.path, "metrics.jsonl"), first, state["intervals"], stage.say)
    with stage.progress(train.images, done=first) as bar:

        def track(row: dict[str, Any]) -> None:
            stage.log({name: value for name, value in row.items() if name != "images_seen"}, step=row["images_seen"])

        def on_metrics(row: dict[str, Any]) -> None:
            log.add(row)
            bar.update(row["images_seen"], measured_rate=row["images_per_second"], **in_short(row))
            track(row)

        for row in log.recovered:
            track(row)

        summary = fit(
            tokenizer, cache, model, train, seed, stage.cluster, on_metrics, stage.say, start, validation, on_validation, passed_over
        )
    log.write()
    if log.rows:  # a run killed after its last checkpoint trains nothing more, but its last interval is known
        summary = {**{name: log.rows[-1][name] for name in FIGURES if name in log.rows[-1]}, **summary}
    if reason := diverged(summary) or skipped_steps(summary):
        stage.say(f"{reason}; lower train.learning_rate in a run with another train.path")
    return stage.complete(train.path, identity, {**summary, "resumed_from": first})


def begun_with(train: TrainSettings, config: MARConfig, class_names: list[str]) -> tuple[Start | None, dict[str, Any]]:
    """What `train.init_from` names, and its part of the run's identity. A run that has checkpoints of its own goes on without it."""
    if not train.init_from:
        return None, {}
    try:
        start = start_from(train.init_from, config, class_names)
    except UserError:
        known = storage.join(train.path, IDENTITY)
        digest = read_identity(train.path).get("train.init_from") if storage.exists(known) else None
        if digest is None or newest_checkpoint(train.path, lambda _: None) is None:  # `train` names the damaged
            raise
        return None, {"train.init_from": digest}
    return start, {"train.init_from": start.digest}


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
    say: Callable[[str], None],
    start: Start | None = None,
    validation: "Validation | None" = None,
    on_validation: Callable[[dict[str, Any]], None] = lambda found: None,
    passed_over: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The Ray Train run itself, untracked: `on_metrics` gets a row an interval (images_seen, loss, …), `say` what happens to workers
    and checkpoints, `passed_over` (by default `say`, once each) the lines about damaged checkpoints. Returns a
    summary. On Ctrl-C and SIGTERM the workers write a checkpoint before those are raised again.
    """
    import ray.train
    from ray.train import ControllerError

    from pipelines.runtime.cluster.process_group import ProcessGroupConfig

    if storage.is_local(train.path):
        train = replace(train, path=str(Path(train.path).resolve()))
    if validation is None:
        train = replace(train, validation_images=0)
    latents = LatentCache(cache.path, str(Path(cache.local).resolve()) if cache.local else "", cache.local_gb)
    config = model_config(model, latents)
    LatentDataset(latents, seed, train.shuffle_window)  # whether the local disk holds what that order reads, said before any work
    _check_batches(train, cluster)
    best = [*METRICS, *([validation.metric] if validation else [])]
    if train.keep_best and train.keep_best not in best:
        known = f"{', '.join(best)}{'' if validation else ', or what a validation finds where train.validation_images is set'}"
        raise UserError(f"train.keep_best is {train.keep_best!r}, expected one of {known}")
    channel = TrainingChannel()
    passed_over = passed_over or once(say)
    last: dict[str, Any] = {}
    broke: list[float] = []

    def receive(message: dict[str, Any]) -> None:
        if "say" in message:
            say(message["say"])
            if "broke" in message:
                broke.append(message["broke"])
        elif "passed over" in message:
            passed_over(message["passed over"])
        elif "started" in message:
            if broke or message["workers"] != train.workers:
                say(f"{message['workers']} workers at work again, {message['started']:,} images seen{_seconds(message, broke)}")
            broke.clear()
        elif "validated" in message:
            on_validation(message)
        else:
            last.update(message)
            on_metrics(message)

    forget_lost_attempts(train.path)
    gpus = cluster.gpus_per_worker
    trainer = Trainer(
        train_worker,
        train_loop_config={
            "job": TrainingJob(
                config, train, latents, tokenizer.path, seed, cluster, channel, start, validation.identity if validation else ""
            )
        },
        validation_config=validation.config(channel) if validation else None,
        torch_config=ProcessGroupConfig(backend="nccl" if gpus else "gloo", timeout_s=train.hang_seconds),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(train.workers_min, train.workers) if 0 < train.workers_min < train.workers else train.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=train.path if storage.is_local(train.path) else storage.filesystem(train.path)[1],
            storage_filesystem=None if storage.is_local(train.path) else storage.filesystem(train.path)[0],
            failure_config=ray.train.FailureConfig(max_failures=train.failures),
            callbacks=[Supervision(channel, train.hang_seconds, train.failures, train.workers_min or train.workers)],
        ),
    )

    def stop() -> None:
        if channel.somebody_works():
            say("ending: the workers write a checkpoint (send the signal again to exit without it)")
        else:
            say("ending: the workers have not begun to train, so there is nothing to write")
        channel.ask(STOP)

    try:
        with ray_train_waits(train.hang_seconds), channel.listening(receive):
            interruption = finish_when_asked(trainer.fit, stop, channel.somebody_works)
    except ControllerError as error:
        raise error.controller_failure from error
    checkpoint = newest_checkpoint(train.path, passed_over)
    if interruption is not None:
        say(f"ended with {checkpoint}; the same command goes on from there" if checkpoint else "ended before the first checkpoint")
        raise interruption
    if checkpoint is None:
        raise UserError(f"{train.path}/checkpoints holds no checkpoint that verifies, though one was just written; is that disk sound?")
    state = read_checkpoint(checkpoint, TrainingState)
    steps = int(state["images_seen"]) // train.batch
    return {
        "images_seen": state["images_seen"],
        "steps": steps,
        "steps_skipped": steps - int(state["step"]),
        **{name: last[name] for name in FIGURES if name in last},
        "workers": train.workers,
        "checkpoint": checkpoint,
    }


def _seconds(started: dict[str, Any], broke: list[float]) -> str:
    """What a new start took, of which a group of workers tells when its first step is done."""
    if not broke:
        return ""
    began, resumed, stepped = (started[one] for one in ("began", "resumed", "stepped"))
    return (
        f" ({stepped - broke[0]:.1f} s later: {began - broke[0]:.1f} s to start them, {resumed - began:.1f} s to load, "
        f"{stepped - resumed:.1f} s for a step)"
    )


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
    decays = [train.ema_decay, *train.ema_decays]
    if len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
        raise UserError(f"train.ema_decays is {train.ema_decays}, expected shares below 1, none twice and none train.ema_decay's")
    fewest = {"train.workers_min": train.workers_min} if 0 < train.workers_min < train.workers else {"train.workers": train.workers}
    require_workers(fewest, cluster)
