"""Stage *tokenize*: train a KL or VQ autoencoder on an image source with Ray Train."""

import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mar_model.files import describe_misfit, shapes_of
from mar_model.tokenizers import KLConfig, VQConfig, without_weights
from pipelines.images.listing import ImageListing, Images
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import check_source, remember_source
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import check, identity_of
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import check_tokenizer_files, initial_weights, tokenizer_config, tokenizer_digest, write_pixels
from pipelines.tokenizing.settings import TokenizerSettings

if TYPE_CHECKING:
    from pipelines.runtime.supervision.listener import Listener


def tokenize(images: Images, tokenizer: TokenizerSettings, stage: Stage) -> dict[str, Any]:
    """Train the tokenizer at `tokenizer.path` on the train part of `images`, resuming where a killed run was.

    Returns the summary: psnr_held_out in dB (psnr_train where nothing is held out), loss, images_per_second, loss_curve as
    [images seen, loss] pairs; beside it `pairs.png`, originals above reconstructions. Raises UserError on settings that don't fit
    each other or the cluster, on an output of another identity, and on a folder with a tokenizer from elsewhere.
    """
    from pipelines.tokenizing.learning.progress import PROGRESS
    from pipelines.tokenizing.result import RESULT, Result

    _check(images.settings, tokenizer)
    path = tokenizer.path
    if storage.exists(storage.join(path, "config.json")) and not storage.exists(storage.join(path, "identity.json")):
        raise UserError(
            f"tokenizer.path {path!r} holds a tokenizer that `mar tokenize` did not make, and would overwrite",
            remedy="go on with `mar cache`, or give another tokenizer.path",
        )
    tokenizer = replace(tokenizer, precision=resolved(tokenizer.precision, stage.cluster))
    listing = images.listing if tokenizer.trained else None
    for note in listing.notes if listing else ():
        stage.say(note)
    identity = identity_of(images=images.settings, tokenizer=tokenizer, seed=stage.seed) | (
        {"images.listing": listing.digest, **_inputs(tokenizer)} if listing else {}
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
            _train(images.settings, tokenizer, listing, stage)
        result = storage.read_json(storage.join(path, RESULT), Result, "delete it, and the tokenizer is trained to its end again")
        part = "held_out" if "psnr_held_out" in result else "train"
        remark = "" if part == "held_out" else " (nothing is held out: these are images it was trained on)"
        stage.say(f"PSNR {result[f'psnr_{part}']:.2f} dB on {result['psnr_images']} {part.replace('_', '-')} images{remark}")
        stage.artifact(storage.join(path, "pairs.png"))
        summary = stage.complete(path, identity, {"images": tokenizer.images, **result})
    for leftover in (PROGRESS, "ray"):
        storage.delete(storage.join(path, leftover))
    return summary


def _inputs(tokenizer: TokenizerSettings) -> dict[str, str]:
    """The part of the identity that is in files: digests of the initial tokenizer and of the perceptual network, where there are any."""
    from pipelines.tokenizing.learning.perceptual import perceptual_digest

    found = {
        "tokenizer.init_from": tokenizer_digest(tokenizer.init_from) if tokenizer.init_from else "",
        "tokenizer.perceptual_weights": perceptual_digest(tokenizer),
    }
    return {name: digest for name, digest in found.items() if digest}


def _train(images: ImageSettings, tokenizer: TokenizerSettings, listing: ImageListing, stage: Stage) -> None:
    """Train to the end. After Ctrl-C or SIGTERM the workers save their progress, then the signal's exception is raised."""
    from pipelines.runtime.supervision.listener import Listener
    from pipelines.tokenizing.learning.perceptual import described
    from pipelines.tokenizing.learning.progress import read_progress

    require_workers({"tokenizer.workers": tokenizer.workers}, stage.cluster)
    progress = read_progress(tokenizer.path)
    first = progress.images_seen if progress else 0
    stage.say(f"resuming from {first:,} images seen" if first else described(tokenizer))
    with stage.progress(tokenizer.images, done=first) as bar:

        def on_metrics(values: dict[str, Any]) -> None:
            if "loss" in values:
                bar.update(int(values["images_seen"]), loss=values["loss"])
            stage.log({name: value for name, value in values.items() if name != "images_seen"}, step=int(values["images_seen"]))

        listener = Listener(tokenizer.workers, on_metrics, lambda _: None, stage.say, stage.say)
        _fit(images, tokenizer, listing, stage, listener)


def _fit(images: ImageSettings, tokenizer: TokenizerSettings, listing: ImageListing, stage: Stage, listener: "Listener") -> None:
    """The Ray Train run."""
    import ray
    import ray.train
    from ray.train import ControllerError

    from pipelines.runtime.cluster.interruption import finish_when_asked
    from pipelines.runtime.cluster.trainer import ProcessGroupConfig, Trainer, scaling
    from pipelines.runtime.supervision.channel import STOP, TrainingChannel
    from pipelines.runtime.supervision.controller import Supervision, ray_train_waits
    from pipelines.tokenizing.job import TokenizerJob
    from pipelines.tokenizing.worker import tokenize_worker

    if storage.is_local(tokenizer.path):
        tokenizer = replace(tokenizer, path=str(Path(tokenizer.path).resolve()))
    if storage.is_local(images.source):
        images = replace(images, source=str(Path(images.source).resolve()))
    channel = TrainingChannel()
    job = TokenizerJob(images, tokenizer, ray.put(listing), stage.seed, stage.cluster, channel)
    gpus = stage.cluster.gpus_per_worker
    trainer = Trainer(
        tokenize_worker,
        train_loop_config={"job": job},
        torch_config=ProcessGroupConfig(backend="nccl" if gpus else "gloo", timeout_s=tokenizer.hang_seconds),
        scaling_config=scaling(tokenizer.workers, gpus),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:12],  # a name seen before would make Ray restore from what a killed run left half-written
            storage_path=storage.join(tokenizer.path, "ray"),
            failure_config=ray.train.FailureConfig(max_failures=tokenizer.failures),
            callbacks=[Supervision(channel, tokenizer.hang_seconds, tokenizer.failures, tokenizer.workers)],
        ),
    )

    def stop() -> None:
        stage.say("stopping: the workers save their progress (send the signal again to exit without it)")
        channel.ask(STOP)

    try:
        with ray_train_waits(tokenizer.hang_seconds), channel.listening(listener.receive):
            interruption = finish_when_asked(trainer.fit, stop, channel.somebody_works)
    except ControllerError as error:
        raise error.controller_failure from error
    if interruption is not None:
        stage.say("stopped; run the same command to resume")
        raise interruption


def _check(images: ImageSettings, tokenizer: TokenizerSettings) -> None:
    check(images=images, tokenizer=tokenizer)
    try:
        sizes = tokenizer.network()
    except ValueError as error:
        raise UserError(f"section tokenizer: {error}") from error
    if misfit := tokenizer.misfit_of(images.size):
        raise UserError(misfit)
    if tokenizer.trained and tokenizer.init_from:
        _check_initial(tokenizer, sizes)


def _check_initial(tokenizer: TokenizerSettings, sizes: KLConfig | VQConfig) -> None:
    """Raise UserError where the weights of `tokenizer.init_from` do not fit the sizes of section tokenizer."""
    expected = shapes_of(without_weights(sizes).state_dict())
    if misfit := describe_misfit(expected, shapes_of(initial_weights(tokenizer.init_from))):
        config = {name: value for name, value in tokenizer_config(tokenizer.init_from).items() if name != "format_version"}
        raise UserError(
            f"tokenizer.init_from {tokenizer.init_from!r} does not fit section tokenizer: {misfit}",
            remedy=f"set tokenizer to its sizes: {', '.join(f'{name}={value}' for name, value in config.items())}",
        )
