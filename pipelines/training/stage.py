"""Stage *train*: trains MAR on a latent cache with Ray Train."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mar_model.config import Architecture, MARConfig
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.checkpoints.directory import TrainingState, forget_lost_attempts, newest_checkpoint, once, read_checkpoint
from pipelines.checkpoints.fine_tuning import Start, start_from
from pipelines.checkpoints.released import checkpoint_directory
from pipelines.runtime import storage
from pipelines.runtime.cluster.interruption import finish_when_asked
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import check, identity_of
from pipelines.runtime.stage import IDENTITY, Stage, read_identity
from pipelines.runtime.supervision.channel import STOP, TrainingChannel
from pipelines.runtime.supervision.controller import Supervision, ray_train_waits
from pipelines.runtime.supervision.listener import Listener
from pipelines.runtime.supervision.messages import Validated
from pipelines.training.data import LatentDataset
from pipelines.training.job import TrainingJob
from pipelines.training.metrics.divergence import diverged, skipped_steps
from pipelines.training.metrics.log import MetricsLog
from pipelines.training.metrics.telemetry import in_short
from pipelines.training.settings import LOSS_COLUMNS, METRICS, TrainSettings
from pipelines.training.validator import Validator
from pipelines.training.worker import train_worker

FIGURES = (  # metrics of the last interval in the summary
    *LOSS_COLUMNS, "images_per_second", "tflops_per_worker", "mfu", "data_wait_share", "communication_share", "checkpoint_share",
    "parameters",
)  # fmt: skip


def train(
    tokenizer_path: str, cache: CacheSettings, model: Architecture, train: TrainSettings, stage: Stage,
    validator: Validator | None = None, on_validation: Callable[[Validated], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Train `model` on the cache at `cache.path` until `train.images` images are seen, resuming from the newest valid checkpoint.
    `validator` validates checkpoints during training (see `jobs.training`); `on_validation` is called with each result.

    Returns the summary: images_seen, steps, steps_skipped (non-finite steps), loss and its bands over the last interval,
    images_per_second, parameters, checkpoint.
    Raises UserError for a missing cache, an output of another identity, or a cluster too small for `train.workers`.
    """
    check(train=train)
    train = replace(train, precision=resolved(train.precision, stage.cluster))
    latents = LatentCache(cache.path)
    start, begun = begun_with(train, model_config(model, latents), latents.manifest.class_names)
    identity = training_identity(cache, model, train, stage.seed) | begun
    summary = stage.begin(train.path, identity, enough=lambda found: (found.get("images_seen") or 0) >= train.images)
    if summary is not None:
        return summary
    passed_over = once(stage.say)
    resumed = newest_checkpoint(train.path, passed_over)
    state: dict[str, Any] = read_checkpoint(resumed, TrainingState) if resumed else {"images_seen": 0, "intervals": []}
    first = int(state["images_seen"])
    stage.say(
        f"resuming from {resumed} ({first:,} images seen)" if resumed else f"starting a new run; checkpoints in {train.path}/checkpoints"
    )
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

        listener = Listener(train.workers, on_metrics, on_validation, stage.say, passed_over)
        summary = fit(training_job(tokenizer_path, cache, model, train, stage, start, validator), listener, validator)
    log.write()
    if log.rows:  # a run that was killed after its last checkpoint has no steps left, but its last interval is known
        summary = {**{name: log.rows[-1][name] for name in FIGURES if name in log.rows[-1]}, **summary}
    if reason := diverged(summary) or skipped_steps(summary):
        stage.say(f"{reason}; lower train.learning_rate in a run with another train.path")
    return stage.complete(train.path, identity, {**summary, "resumed_from": first})


def begun_with(train: TrainSettings, config: MARConfig, class_names: list[str]) -> tuple[Start | None, dict[str, Any]]:
    """The initial weights for `train.init_from`, and their part of the run's identity. A run with checkpoints resumes without them."""
    if not train.init_from:
        return None, {}
    try:
        start = start_from(checkpoint_directory(train.init_from), config, class_names)
    except UserError:
        known = storage.join(train.path, IDENTITY)
        digest = read_identity(train.path).get("train.init_from") if storage.exists(known) else None
        if digest is None or newest_checkpoint(train.path, lambda _: None) is None:  # `train` reports damaged checkpoints
            raise
        return None, {"train.init_from": digest}
    return start, {"train.init_from": start.digest}


def training_identity(cache: CacheSettings, model: Architecture, train: TrainSettings, seed: int) -> dict[str, Any]:
    """The settings that determine the trained weights, except for the length of training."""
    return {**identity_of(model=model, train=train, seed=seed), "cache.digest": LatentCache(cache.path).digest}


def training_job(
    tokenizer_path: str, cache: CacheSettings, model: Architecture, train: TrainSettings, stage: Stage, start: Start | None,
    validator: Validator | None,
) -> TrainingJob:  # fmt: skip
    """Arguments of the workers. Raises UserError for settings that do not fit each other, the cache or the cluster."""
    if storage.is_local(train.path):
        train = replace(train, path=str(Path(train.path).resolve()))
    if validator is None:
        train = replace(train, validation_images=0)
    latents = LatentCache(cache.path, str(Path(cache.local).resolve()) if cache.local else "", cache.local_gb)
    config = model_config(model, latents)
    LatentDataset(latents, stage.seed, train.shuffle_window)  # raises UserError if the local disk is too small for that order
    fewest = {"train.workers_min": train.workers_min} if 0 < train.workers_min < train.workers else {"train.workers": train.workers}
    require_workers(fewest, stage.cluster)
    _check_best(train, validator)
    validated_as = validator.identity if validator else ""
    return TrainingJob(config, train, latents, tokenizer_path, stage.seed, stage.cluster, TrainingChannel(), start, validated_as)


def fit(job: TrainingJob, listener: Listener, validator: Validator | None = None) -> dict[str, Any]:
    """Run Ray Train, without tracking; `listener` receives the workers' messages. Returns a summary. After Ctrl-C or SIGTERM the workers
    write a checkpoint, then the signal's exception is raised.
    """
    import ray.train
    from ray.train import ControllerError

    from pipelines.runtime.cluster.trainer import ProcessGroupConfig, Trainer, scaling

    train = job.train
    forget_lost_attempts(train.path)
    gpus = job.cluster.gpus_per_worker
    trainer = Trainer(
        train_worker,
        train_loop_config={"job": job},
        validation_config=validator.config(job.channel) if validator else None,
        torch_config=ProcessGroupConfig(backend="nccl" if gpus else "gloo", timeout_s=train.hang_seconds),
        scaling_config=scaling((train.workers_min, train.workers) if 0 < train.workers_min < train.workers else train.workers, gpus),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=train.path if storage.is_local(train.path) else storage.filesystem(train.path)[1],
            storage_filesystem=None if storage.is_local(train.path) else storage.filesystem(train.path)[0],
            failure_config=ray.train.FailureConfig(max_failures=train.failures),
            callbacks=[Supervision(job.channel, train.hang_seconds, train.failures, train.workers_min or train.workers)],
        ),
    )

    def stop() -> None:
        if job.channel.somebody_works():
            listener.say("stopping: the workers write a checkpoint (send the signal again to exit without it)")
        else:
            listener.say("stopping: the workers have not started training, there is nothing to write")
        job.channel.ask(STOP)

    try:
        with ray_train_waits(train.hang_seconds), job.channel.listening(listener.receive):
            interruption = finish_when_asked(trainer.fit, stop, job.channel.somebody_works)
    except ControllerError as error:
        raise error.controller_failure from error
    checkpoint = newest_checkpoint(train.path, listener.passed_over)
    if interruption is not None:
        listener.say(f"stopped with {checkpoint}; run the same command to resume" if checkpoint else "stopped before the first checkpoint")
        raise interruption
    if checkpoint is None:
        raise UserError(
            f"{train.path}/checkpoints contains no valid checkpoint, although a checkpoint was just written", remedy="check that disk"
        )
    state = read_checkpoint(checkpoint, TrainingState)
    steps = int(state["images_seen"]) // train.batch
    return {
        "images_seen": state["images_seen"],
        "steps": steps,
        "steps_skipped": steps - int(state["step"]),
        **{name: listener.last[name] for name in FIGURES if name in listener.last},
        "workers": train.workers,
        "checkpoint": checkpoint,
    }


def model_config(model: Architecture, cache: LatentCache) -> MARConfig:
    """The model's complete configuration: the architecture and the values from the cache. Raises UserError if they do not fit."""
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


def _check_best(train: TrainSettings, validator: Validator | None) -> None:
    metrics = [*METRICS, *([validator.metric] if validator else [])]
    if train.keep_best and train.keep_best not in metrics:
        known = f"{', '.join(metrics)}{'' if validator else ', or a validation metric if train.validation_images is set'}"
        raise UserError(f"train.keep_best is {train.keep_best!r}, expected one of {known}")
