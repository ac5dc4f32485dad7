"""The whole journey in one command: images → tokenizer → cache → model → sweeps → evaluation → report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jobs import training
from jobs.quickstart.attempts import Attempts
from jobs.quickstart.digits import write_digits
from jobs.report.page import report
from mar_model.config import Architecture
from pipelines.caching import stage as caching
from pipelines.caching.settings import CacheSettings
from pipelines.evaluation import cautions
from pipelines.evaluation import stage as evaluation
from pipelines.evaluation.classifier import train_classifier
from pipelines.evaluation.comparison import frechet_rows, real_and_noise
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import ImageListing, list_images
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import check_source
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.progress import console
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import FORMAT_VERSION, Stage, open_stage
from pipelines.runtime.tracking import TrackingSettings
from pipelines.sweeping import stage as sweeping
from pipelines.sweeping.settings import SweepSettings
from pipelines.sweeping.stage import check_metric
from pipelines.tokenizing import stage as tokenizing
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.training.settings import TrainSettings

WIDTH_SWEEP_SHARE = 0.04  # of train.images: long enough to tell two denoiser widths apart, short enough for a demo
FRECHET_IMAGES = 500  # at most, in each row of the comparison: distances are comparable only at equal numbers


def quickstart(
    *,
    images: ImageSettings,
    tokenizer: TokenizerSettings,
    cache: CacheSettings,
    model: Architecture,
    train: TrainSettings,
    generate: GenerateSettings,
    evaluate: EvaluateSettings,
    sweep: SweepSettings,
    tracking: TrackingSettings,
    cluster: ClusterSettings,
    seed: int,
    configuration: dict[str, Any],
    digits: bool,
) -> dict[str, Any]:
    """Run every stage that is not complete yet, all in one Ray, and write `summary.json` and `report.html` in the folder that
    holds train.path.

    `digits`: the demo's digits are written to `images.source` if nothing is there. Returns the summary.
    Raises UserError when that folder holds a run of another configuration, and before any work for what would fail hours later.
    """
    root = _parent(train.path)
    if digits and not storage.exists(images.source):
        console().print(f"quickstart: writing {write_digits(images.source):,} digits to {images.source}", markup=False, soft_wrap=True)
    listing = list_images(images)
    compared = _images_compared(images, listing, evaluate)
    _check_sweep(sweep, evaluate)
    identity = identity_of(
        images=images, tokenizer=tokenizer, cache=cache, model=model, train=train, generate=generate, evaluate=evaluate, sweep=sweep,
        seed=seed,
    )  # fmt: skip
    identity["train.images"] = train.images  # here the run's length decides the result, for all that follows is made from its end
    identity["images.listing"] = listing.digest
    identity["evaluate.network"] = network_digest(evaluate.features, evaluate.weights)
    whole = Stage("quickstart", cluster, configuration)
    check_source(root, "folder for train.path and the others", images.source, listing, identity, whole, kept=cache.path)
    finished = whole.begin(root, identity)
    if finished is not None:
        for stage, took in finished["seconds_by_stage"].items():
            console().print(f"quickstart: {stage} is complete ({took:.0f} s)", markup=False)
        return finished

    seconds: dict[str, float] = {}
    with (
        Attempts(
            storage.join(root, "attempts.json"), lambda text: console().print(f"quickstart: {text}", markup=False, soft_wrap=True)
        ) as attempts,
        open_stage("quickstart", root, configuration, cluster, tracking) as run,
    ):
        parent = run.track()

        @contextmanager
        def stage(name: str, path: str) -> Iterator[Stage]:
            with open_stage(name, path, configuration, cluster, tracking, parent) as child:
                yield child

        def note(name: str, summary: dict[str, Any]) -> dict[str, Any]:
            seconds[name] = summary["seconds"]
            return summary

        with stage("tokenize", tokenizer.path) as child:
            note("tokenize", tokenizing.tokenize(images, tokenizer, seed, child))
        with stage("cache", cache.path) as child:
            note("cache", caching.cache(images, tokenizer, cache, child))
        with stage("train", train.path) as child:
            note("train", training.train(images, tokenizer, cache, model, train, generate, evaluate, seed, child))
        classifier = storage.join(root, "classifier")
        with stage("classifier", classifier) as child:
            real = note("classifier", train_classifier(images, classifier, seed, child))
        evaluate = replace(evaluate, classifier=classifier)

        sections: dict[str, Any] = {
            "images": images, "tokenizer": tokenizer, "cache": cache, "model": model, "train": train, "generate": generate,
            "seed": seed,
        }  # fmt: skip
        with stage("sweep-generate", sweep.path) as child:
            # computed once, for the sweep, the evaluation and the comparison
            beside = real_and_noise(images, seed, compared).values()
            evaluate = evaluation.with_reference(images, tokenizer, evaluate, child, beside)
            sections["evaluate"] = replace(evaluate, actors=1)  # of each of the trials, which run side by side
            swept = note("sweep-generate", sweeping.sweep(**sections, sweep=sweep, stage=child))
        width = width_sweep(sweep, model)
        short = replace(train, images=int(train.images * WIDTH_SWEEP_SHARE), warmup_images=train.warmup_images // 4, workers=1)
        with stage("sweep-train", width.path) as child:
            note("sweep-train", sweeping.sweep(**{**sections, "train": short}, sweep=width, stage=child))

        chosen = {name.removeprefix("generate."): value for name, value in swept["best"]["parameters"].items()}
        drawn = replace(generate, **chosen)
        with stage("evaluate", evaluate.path) as child:
            evaluated = note("evaluate", evaluation.evaluate(images, tokenizer, train, drawn, evaluate, seed, child))
            rows = frechet_rows(images, evaluate, seed, compared, child)

        caution = cautions.of_distance({cautions.ROW_IMAGES: compared}, evaluate.features)
        # Ray's start, the reference's features, the comparison, and what killed attempts had done
        by_stage = {**seconds, "other": max(0.0, attempts.seconds - sum(seconds.values()))}
        summary = {
            "seconds": round(attempts.seconds, 1),
            "seconds_by_stage": {name: round(value, 1) for name, value in by_stage.items()},
            "peak_memory_gb": round(attempts.peak_memory_gb, 2),
            "samples": evaluated["images"],
            "label_agreement": evaluated["label_agreement"],
            "classifier_accuracy_real": real["accuracy_held_out"],
            "frechet_distance": rows,
            "frechet_images": compared,
            **({"caution": caution} if caution else {}),
            "sampling": chosen,
            "resumed": attempts.resumed,
        }
        storage.write_bytes(storage.join(root, "samples.png"), storage.read_bytes(storage.join(evaluate.path, "samples.png")))
        report(root, {"format_version": FORMAT_VERSION, **summary})
        return run.complete(root, identity, summary)


def _check_sweep(sweep: SweepSettings, evaluate: EvaluateSettings) -> None:
    """Raise UserError before any work for a sweep that the quickstart can't end in."""
    if sweep.over != "generate":
        raise UserError(
            f"sweep.over is {sweep.over!r}",
            remedy="the quickstart draws with what a sweep over generate finds best, and sweeps the denoiser's "
            "width by itself: set sweep.over=generate, or run `mar sweep` after `mar train`",
        )
    check_metric(sweep, replace(evaluate, classifier="classifier"))  # the quickstart trains one


def _images_compared(images: ImageSettings, listing: ImageListing, evaluate: EvaluateSettings) -> int:
    """Images in each row of the comparison. Raises UserError before any work where nothing is held out to compare with."""
    held_out = len(listing.held_out())
    if held_out < 2:
        raise UserError(
            f"{images.source} has {held_out} held-out images, and the quickstart compares what it draws with those: "
            "set images.held_out_share, e.g. 0.1, or images.held_out_folder"
        )
    compared = min(FRECHET_IMAGES, held_out, len(listing.train()), evaluate.images)
    if compared < 2:
        raise UserError(
            f"the quickstart compares {len(listing.train())} images to train on, {held_out} held-out images and evaluate.images "
            f"{evaluate.images}: expected 2 or more of each, since one image has no covariance"
        )
    return compared


def width_sweep(sweep: SweepSettings, model: Architecture) -> SweepSettings:
    """The demo's second sweep: short trainings of two widths of the denoiser, beside the first sweep's folder."""
    widths = [model.denoiser_width // 2, model.denoiser_width]
    return replace(
        sweep,
        path=sweep.path.rstrip("/") + "-width",
        over="train",
        parameters={"model.denoiser_width": widths},
        metric="loss",
        mode="min",
    )


def _parent(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0] or "."
