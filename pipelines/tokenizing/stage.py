"""Stage *tokenize*: train a KL autoencoder of the KL-16 family on an image source with Ray Train."""

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.images.listing import ImageListing, Images
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import check_source, remember_source
from pipelines.runtime import storage
from pipelines.runtime.cluster.channel import MessageChannel, Metrics
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.errors import UserError
from pipelines.runtime.progress import Bar
from pipelines.runtime.settings import check, identity_of
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import check_tokenizer_files, write_pixels
from pipelines.tokenizing.settings import TokenizerSettings

FAILURES = 3  # restarts after failed workers before the stage gives up


def tokenize(images: Images, tokenizer: TokenizerSettings, stage: Stage) -> dict[str, Any]:
    """Train the tokenizer at `tokenizer.path` on the train part of `images`, going on from where a killed run was.

    Returns the summary: psnr_held_out in dB (psnr_train where nothing is held out), loss, images_per_second, loss_curve as
    [images seen, loss] pairs; beside it `pairs.png`, originals above reconstructions. Raises UserError on settings that don't fit
    each other or the cluster, on an output of another identity, and on a folder with a tokenizer from elsewhere.
    """
    from pipelines.tokenizing.result import RESULT
    from pipelines.tokenizing.worker import PROGRESS, Result, read_progress

    _check(images.settings, tokenizer)
    path = tokenizer.path
    if storage.exists(storage.join(path, "config.json")) and not storage.exists(storage.join(path, "identity.json")):
        raise UserError(
            f"tokenizer.path {path!r} holds a tokenizer that `mar tokenize` did not make, and would overwrite",
            remedy="go on with `mar cache`, or give another tokenizer.path",
        )
    tokenizer = replace(tokenizer, precision=resolved(tokenizer.precision, stage.cluster))
    listing = images.listing if tokenizer.kind == "kl" else None
    for note in listing.notes if listing else ():
        stage.say(note)
    identity = identity_of(images=images.settings, tokenizer=tokenizer, seed=stage.seed) | (
        {"images.listing": listing.digest} if listing else {}
    )
    if listing is not None:
        check_source(path, "tokenizer.path", images.settings.source, listing, identity, stage)
    summary = stage.begin(path, identity)
    if summary is not None:
        check_tokenizer_files(path)
    if listing is None:
        if summary is None:
            write_pixels(path)
            summary = stage.complete(path, identity, {"images": 0})
        return summary
    if summary is None:
        remember_source(path, listing)
        if not storage.exists(storage.join(path, RESULT)):
            require_workers({"tokenizer.workers": tokenizer.workers}, stage.cluster)
            progress = storage.join(path, PROGRESS)
            first = read_progress(progress)[1] if storage.exists(progress) else 0
            if first:
                stage.say(f"going on from {first:,} images seen")
            with stage.progress(tokenizer.images, done=first) as bar:
                _fit(images.settings, tokenizer, listing, stage, bar)
        result = storage.read_json(storage.join(path, RESULT), Result, "delete it, and the tokenizer is trained to its end again")
        part = "held_out" if "psnr_held_out" in result else "train"
        remark = "" if part == "held_out" else " (nothing is held out: these are images it was trained on)"
        stage.say(f"PSNR {result[f'psnr_{part}']:.2f} dB on {result['psnr_images']} {part.replace('_', '-')} images{remark}")
        stage.artifact(storage.join(path, "pairs.png"))
        summary = stage.complete(path, identity, {"images": tokenizer.images, **result})
    for leftover in (PROGRESS, "ray"):
        storage.delete(storage.join(path, leftover))
    return summary


def _fit(images: ImageSettings, tokenizer: TokenizerSettings, listing: ImageListing, stage: Stage, bar: Bar) -> None:
    """The Ray Train run."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig

    from pipelines.runtime.cluster.interruption import finish_when_asked
    from pipelines.runtime.cluster.trainer import Trainer, scaling
    from pipelines.tokenizing.job import TokenizerJob
    from pipelines.tokenizing.worker import tokenize_worker

    if storage.is_local(tokenizer.path):
        tokenizer = replace(tokenizer, path=str(Path(tokenizer.path).resolve()))
    if storage.is_local(images.source):
        images = replace(images, source=str(Path(images.source).resolve()))

    def on_metrics(metrics: Metrics) -> None:
        bar.update(metrics.images_seen, loss=metrics.values["loss"])
        stage.log({name: value for name, value in metrics.values.items() if name != "images_seen"}, step=metrics.images_seen)

    channel = MessageChannel()
    job = TokenizerJob(images, tokenizer, ray.put(listing), stage.seed, stage.cluster, channel)
    gpus = stage.cluster.gpus_per_worker
    trainer = Trainer(
        tokenize_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=scaling(tokenizer.workers, gpus),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:12],  # a name seen before would make Ray restore from what a killed run left half-written
            storage_path=storage.join(tokenizer.path, "ray"),
            failure_config=ray.train.FailureConfig(max_failures=FAILURES),
        ),
    )
    try:
        with channel.listening(on_metrics):
            finish_when_asked(trainer.fit)
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError):
                raise failure from error
        raise


def _check(images: ImageSettings, tokenizer: TokenizerSettings) -> None:
    check(images=images, tokenizer=tokenizer)
    try:
        tokenizer.network()
    except ValueError as error:
        raise UserError(f"section tokenizer: {error}") from error
    if misfit := tokenizer.misfit_of(images.size):
        raise UserError(misfit)
