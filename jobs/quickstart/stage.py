"""All stages in one command: images → tokenizer → cache → model → sweeps → evaluation → report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs import training
from jobs.quickstart.attempts import Attempts
from jobs.quickstart.digits import write_digits
from jobs.report.page import report
from jobs.stages import run_directory, sections_of
from mar_model.config import Architecture
from pipelines.caching import stage as caching
from pipelines.evaluation import cautions
from pipelines.evaluation import stage as evaluation
from pipelines.evaluation.classifier import train_classifier
from pipelines.evaluation.comparison import frechet_rows, real_and_noise
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.images.source_changes import check_source
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.progress import console
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import FORMAT_VERSION, Stage, open_stage
from pipelines.sweeping import stage as sweeping
from pipelines.sweeping.settings import SweepSettings
from pipelines.sweeping.stage import check_metric
from pipelines.tokenizing import stage as tokenizing

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig

WIDTH_SWEEP_SHARE = 0.04  # share of train.images: long enough to distinguish two denoiser widths, short enough for a demo
FRECHET_IMAGES = 500  # maximum per row of the comparison; distances are comparable only for equal numbers of images


def quickstart(config: "RunConfig", digits: bool) -> dict[str, Any]:
    """Run all unfinished stages of `config` on one Ray instance, and write `summary.json` and `report.html` to the parent of train.path.

    `digits`: write the demo's digits to `images.source` if it does not exist. Returns the summary.
    Raises UserError if that directory holds a run of another configuration, and before any work if a later stage would fail.
    """
    recorded, config = config.recorded(), config.located()
    sections, sweep, cluster = sections_of(config), config.sweep, config.cluster
    images, train, evaluate = sections.images, sections.train, sections.evaluate
    root = run_directory(config)
    if digits and not storage.exists(images.settings.source):
        written = write_digits(images.settings.source)
        console().print(f"quickstart: writing {written:,} digits to {images.settings.source}", markup=False, soft_wrap=True)
    compared = _images_compared(images, evaluate)
    _check_sweep(sweep, evaluate)
    identity = {
        **identity_of(
            images=images.settings, tokenizer=config.tokenizer, cache=config.cache, model=config.model, train=train,
            generate=config.generate, evaluate=evaluate, sweep=sweep, seed=config.seed,
        ),
        "train.images": train.images,  # part of the identity here, because all later stages use the end of training
        "images.listing": images.listing.digest,
        "evaluate.network": network_digest(evaluate.features, evaluate.weights),
    }  # fmt: skip
    whole = Stage("quickstart", cluster, recorded)
    source = images.settings.source
    check_source(root, "folder for train.path and the others", source, images.listing, identity, whole, kept=config.cache.path)
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
        open_stage("quickstart", root, recorded, cluster, config.tracking) as run,
    ):
        parent = run.track()

        @contextmanager
        def stage(name: str, path: str) -> Iterator[Stage]:
            with open_stage(name, path, recorded, cluster, config.tracking, parent, config.seed) as child:
                yield child

        def note(name: str, summary: dict[str, Any]) -> dict[str, Any]:
            seconds[name] = summary["seconds"]
            return summary

        with stage("tokenize", config.tokenizer.path) as child:
            note("tokenize", tokenizing.tokenize(images, config.tokenizer, child))
        with stage("cache", config.cache.path) as child:
            note("cache", caching.cache(images, config.tokenizer.path, config.cache, child))
        with stage("train", train.path) as child:
            note("train", training.train(**vars(sections), stage=child))
        classifier = storage.join(root, "classifier")
        with stage("classifier", classifier) as child:
            real = note("classifier", train_classifier(images, classifier, child))
        evaluate = replace(evaluate, classifier=classifier)

        with stage("sweep-generate", sweep.path) as child:
            # computed once for the sweep, the evaluation and the comparison
            beside = real_and_noise(images, config.seed, compared).values()
            evaluate = evaluation.with_reference(images, sections.tokenizer_path, evaluate, child, beside)
            sections = replace(sections, evaluate=replace(evaluate, actors=1))  # for each trial; trials run in parallel
            swept = note("sweep-generate", sweeping.sweep(sections, sweep, child))
        width = width_sweep(sweep, config.model)
        short = replace(train, images=int(train.images * WIDTH_SWEEP_SHARE), warmup_images=train.warmup_images // 4, workers=1)
        with stage("sweep-train", width.path) as child:
            note("sweep-train", sweeping.sweep(replace(sections, train=short), width, child))

        chosen = {name.removeprefix("generate."): value for name, value in swept["best"]["parameters"].items()}
        drawn = replace(sections.generate, **chosen)
        with stage("evaluate", evaluate.path) as child:
            evaluated = note("evaluate", evaluation.evaluate(images, sections.tokenizer_path, train.path, drawn, evaluate, child))
            rows = frechet_rows(images, evaluate, compared, child)

        caution = cautions.of_distance({cautions.ROW_IMAGES: compared}, evaluate.features)
        # Ray's start, the reference's features, the comparison, and the time of killed attempts
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
    """Raise UserError before any work if the quickstart cannot use this sweep."""
    if sweep.over != "generate":
        raise UserError(
            f"sweep.over is {sweep.over!r}",
            remedy="the quickstart samples with the best trial of a sweep over generate, and adds a sweep over the denoiser's "
            "width: set sweep.over=generate, or run `mar sweep` after `mar train`",
        )
    check_metric(sweep, replace(evaluate, classifier="classifier"))  # the quickstart trains one


def _images_compared(images: Images, evaluate: EvaluateSettings) -> int:
    """The number of images per row of the comparison. Raises UserError before any work if there are too few."""
    held_out, to_train_on = len(images.listing.held_out()), len(images.listing.train())
    if held_out < 2:
        raise UserError(
            f"{images.settings.source} has {held_out} held-out images, but the quickstart compares its samples with held-out images: "
            "set images.held_out_share, e.g. 0.1, or images.held_out_folder"
        )
    compared = min(FRECHET_IMAGES, held_out, to_train_on, evaluate.images)
    if compared < 2:
        raise UserError(
            f"the quickstart compares {to_train_on} training images, {held_out} held-out images and {evaluate.images} samples "
            "(evaluate.images): expected at least 2 of each, because one image has no covariance"
        )
    return compared


def width_sweep(sweep: SweepSettings, model: Architecture) -> SweepSettings:
    """The demo's second sweep: short trainings with two denoiser widths, written next to the first sweep's directory."""
    widths = [model.denoiser_width // 2, model.denoiser_width]
    return replace(
        sweep,
        path=sweep.path.rstrip("/") + "-width",
        over="train",
        parameters={"model.denoiser_width": widths},
        metric="loss",
        mode="min",
    )
