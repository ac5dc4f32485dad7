"""All stages in one command: images → tokenizer → cache → model → sweeps → evaluation → report."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from pipelines.evaluation.classifier.training import train_classifier
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
from pipelines.runtime.tracking import Tracker
from pipelines.sweeping import stage as sweeping
from pipelines.sweeping.settings import SweepSettings
from pipelines.sweeping.stage import check_metric
from pipelines.sweeping.trials import Sections
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
    sections, root = sections_of(config), run_directory(config)
    source = config.images.source
    if digits and not storage.exists(source):
        _say(f"writing {write_digits(source):,} digits to {source}")
    compared = _images_compared(sections.images, config.evaluate)
    _check_sweep(config.sweep, config.evaluate)
    identity = _identity(config, sections.images.listing.digest)
    whole = Stage("quickstart", config.cluster, recorded)
    listing = sections.images.listing
    check_source(root, "folder for train.path and the others", source, listing, identity, whole, kept=config.cache.path)
    finished = whole.begin(root, identity)
    if finished is not None:
        for stage, took in finished["seconds_by_stage"].items():
            _say(f"{stage} is complete ({took:.0f} s)")
        return finished

    with (
        Attempts(storage.join(root, "attempts.json"), _say) as attempts,
        open_stage("quickstart", root, recorded, config.cluster, config.tracking) as run,
    ):
        journey = Journey(config, recorded, run.track())
        found = journey.run(sections, compared)
        # Ray's start, the reference's features, the comparison, and the time of killed attempts
        by_stage = {**journey.seconds, "other": max(0.0, attempts.seconds - sum(journey.seconds.values()))}
        summary = {
            "seconds": round(attempts.seconds, 1),
            "seconds_by_stage": {name: round(value, 1) for name, value in by_stage.items()},
            "peak_memory_gb": round(attempts.peak_memory_gb, 2),
            **found,
            "resumed": attempts.resumed,
        }
        samples = storage.join(config.evaluate.path, "samples.png")
        storage.write_bytes(storage.join(root, "samples.png"), storage.read_bytes(samples))
        report(root, {"format_version": FORMAT_VERSION, **summary})
        return run.complete(root, identity, summary)


@dataclass
class Journey:
    """The stages of one run, one after the other; `seconds` by stage."""

    config: "RunConfig"  # with absolute paths
    recorded: dict[str, Any]
    parent: Tracker | None
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, path: str, work: Callable[[Stage], dict[str, Any]]) -> dict[str, Any]:
        """Run `work` as a stage of this name; its summary."""
        config = self.config
        with open_stage(name, path, self.recorded, config.cluster, config.tracking, self.parent, config.seed) as child:
            summary = work(child)
        self.seconds[name] = summary["seconds"]
        return summary

    def run(self, sections: Sections, compared: int) -> dict[str, Any]:
        """All stages; the figures that the run's summary shows."""
        config, images, train = self.config, sections.images, sections.train
        root = run_directory(config)
        self.stage("tokenize", config.tokenizer.path, lambda stage: tokenizing.tokenize(images, config.tokenizer, stage))
        self.stage("cache", config.cache.path, lambda stage: caching.cache(images, config.tokenizer.path, config.cache, stage))
        self.stage("train", train.path, lambda stage: training.train(**vars(sections), stage=stage))
        classifier = storage.join(root, "classifier")
        real = self.stage("classifier", classifier, lambda stage: train_classifier(images, classifier, stage))
        evaluate = replace(config.evaluate, classifier=classifier)

        def sweep_generation(stage: Stage) -> dict[str, Any]:
            nonlocal evaluate, sections
            # computed once for the sweep, the evaluation and the comparison
            beside = real_and_noise(images, config.seed, compared, sections.tokenizer_path).values()
            evaluate = evaluation.with_reference(images, sections.tokenizer_path, evaluate, stage, beside)
            sections = replace(sections, evaluate=replace(evaluate, actors=1))  # for each trial; trials run in parallel
            return sweeping.sweep(sections, config.sweep, stage)

        swept = self.stage("sweep-generate", config.sweep.path, sweep_generation)
        width = width_sweep(config.sweep, config.model)
        short = replace(train, images=int(train.images * WIDTH_SWEEP_SHARE), warmup_images=train.warmup_images // 4, workers=1)
        self.stage("sweep-train", width.path, lambda stage: sweeping.sweep(replace(sections, train=short), width, stage))

        chosen = {name.removeprefix("generate."): value for name, value in swept["best"]["parameters"].items()}
        drawn = replace(sections.generate, **chosen)
        rows: dict[str, float] = {}

        def evaluate_and_compare(stage: Stage) -> dict[str, Any]:
            summary = evaluation.evaluate(images, sections.tokenizer_path, train.path, drawn, evaluate, stage)
            rows.update(frechet_rows(images, evaluate, compared, stage, sections.tokenizer_path))
            return summary

        evaluated = self.stage("evaluate", evaluate.path, evaluate_and_compare)
        caution = cautions.of_distance({cautions.ROW_IMAGES: compared}, evaluate.features)
        return {
            "samples": evaluated["images"],
            "label_agreement": evaluated["label_agreement"],
            "classifier_accuracy_real": real["accuracy_held_out"],
            "frechet_distance": rows,
            "frechet_images": compared,
            **({"caution": caution} if caution else {}),
            "sampling": chosen,
        }


def _identity(config: "RunConfig", listing: str) -> dict[str, Any]:
    """What decides the result of a run: every setting, its length, the images and the network that judges."""
    names = ("images", "tokenizer", "cache", "model", "train", "generate", "evaluate", "sweep", "seed")
    return {
        **identity_of(**{name: getattr(config, name) for name in names}),
        "train.images": config.train.images,  # part of the identity here, because all later stages use the end of training
        "images.listing": listing,
        "evaluate.network": network_digest(config.evaluate.features, config.evaluate.weights),
    }


def _say(text: str) -> None:
    console().print(f"quickstart: {text}", markup=False, soft_wrap=True)


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
