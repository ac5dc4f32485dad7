"""Stage *evaluate*: samples → feature network → streaming statistics → Fréchet distance, label agreement."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipelines.evaluation import cautions
from pipelines.evaluation.classifier import check_classes, classifier_digest
from pipelines.evaluation.features import DIMENSIONS, network_digest
from pipelines.evaluation.image_sets import DrawnSamples, ImageSource, RealImages
from pipelines.evaluation.record import DEFINITIONS, PICTURE, RECORD, STATISTICS, check_count, metric_name
from pipelines.evaluation.references import find_reference, source_statistics, statistics_path
from pipelines.evaluation.scoring import Judges, scored
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import FeatureStatistics, FeatureSums, distance
from pipelines.generation import samples
from pipelines.generation.drawing import Drawing, plan_drawing, range_warning
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.stage import draw
from pipelines.images.grid import grid_samples, write_grid
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import FORMAT_VERSION, Stage
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.training.settings import TrainSettings

NOT_USED = ("generate.images", "generate.labels", "generate.samples", "generate.keep_pixels")  # it draws evaluate.images, of all classes


def evaluate(
    images: ImageSettings, tokenizer: TokenizerSettings, train: TrainSettings, generate: GenerateSettings,
    evaluate: EvaluateSettings, seed: int, stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    """Draw `evaluate.images` samples, every class in turn, and compare them with the reference.

    `evaluate.path` gets `evaluation.json`, `statistics.npz` (mu, sigma of the samples), `samples.png`, the samples' `shards/` and the
    reference's statistics. Returns the summary: the distance under its network's name and as `frechet_distance`, and where a
    classifier is given `label_agreement`; `caution` where the images are too few for these. Raises UserError for missing weights,
    checkpoint, reference or classifier, and for fewer than two samples.
    """
    check_count("evaluate.images", evaluate.images)
    generate = replace(generate, precision=resolved(generate.precision, stage.cluster))
    digest = network_digest(evaluate.features, evaluate.weights)
    drawing = plan_drawing(evaluate.path, [], tokenizer, train, generate, seed, stage.cluster, files=False, say=stage.say)
    if evaluate.classifier:
        check_classes(evaluate.classifier, len(drawing.labels))
    require_workers({"generate.actors": generate.actors}, stage.cluster)
    require_workers({"generate.actors": generate.actors, "evaluate.actors": evaluate.actors}, stage.cluster, cpus_each=0)
    reference = find_reference(images, tokenizer, evaluate, digest)
    identity = {**scoring_identity(reference, generate, evaluate, digest), **drawing.identity}
    finished = stage.begin(evaluate.path, identity)
    if finished is not None:
        if isinstance(reference, RealImages) and not storage.exists(statistics_path(evaluate, reference, digest)):
            stage.say(
                "files of the reference's images were written since it was measured, with as many bytes: whether they are the same "
                "images is not known; give another evaluate.path to measure them again"
            )
        return finished
    if isinstance(reference, FeatureStatistics):
        real = reference
    else:
        stage.say(f"features of {len(reference):,} reference images")
        [real] = source_statistics([reference], evaluate, digest, stage)

    name = metric_name(evaluate.features)
    result = _score(drawing, evaluate, stage, min(evaluate.images, real.count or evaluate.images))
    samples_statistics = FeatureStatistics.of(result.sums, evaluate.features, digest)
    samples_statistics.save(storage.join(evaluate.path, STATISTICS))
    metrics = {name: distance(samples_statistics, real)}
    if evaluate.classifier:
        metrics["label_agreement"] = result.agreeing / evaluate.images
    first = FeatureStatistics.of(result.first, evaluate.features, digest)
    first.save(statistics_path(evaluate, DrawnSamples(evaluate.path, first.count or 0, identity), digest))
    _write_picture(drawing, evaluate, stage)
    if result.out_of_range:
        stage.say(range_warning(result.out_of_range, evaluate.images, drawing))
    figures: dict[str, Any] = {
        "images": evaluate.images,
        **metrics,
        "out_of_range": result.out_of_range,
        **drawing.speed(result.drawn, result.seconds),
    }
    found = cautions.of_evaluation({**figures, "features": evaluate.features, "reference_images": real.count})
    for caution in found:
        stage.say(caution)
    if found:
        figures["caution"] = "; ".join(found)
    record = {
        "format_version": FORMAT_VERSION,
        **figures,
        "metrics": metrics,
        "definitions": {metric: DEFINITIONS[metric] for metric in metrics},
        "at_equal_numbers": {"images": first.count, name: distance(first, real)},
        "reference": {**reference.identity(), "images": real.count},
        "network": {"name": evaluate.features, "digest": digest},
        "seed": seed,
        "generation": {**asdict(generate), "checkpoint": drawing.checkpoint, "images_seen": drawing.state["images_seen"]},
        "identity": identity,
    }
    storage.write_json(storage.join(evaluate.path, RECORD), record)
    for file in (RECORD, PICTURE):
        if storage.is_local(evaluate.path):
            stage.artifact(storage.join(evaluate.path, file))
    return stage.complete(
        evaluate.path,
        identity,
        {
            **figures,
            "images_per_second": result.images_per_second,
            "frechet_distance": metrics[name],
            "features": evaluate.features,
            "reference_images": real.count,
        },
    )


def scoring_identity(
    reference: FeatureStatistics | ImageSource, generate: GenerateSettings, evaluate: EvaluateSettings, digest: str
) -> dict[str, Any]:
    """What decides the metrics of samples of given weights: how they are drawn, and by digest, wherever they lie, what judges them."""
    return {
        **{name: value for name, value in identity_of(generate=generate, evaluate=evaluate).items() if name not in NOT_USED},
        "evaluate.reference": storage.digest(json.dumps(reference.identity(), sort_keys=True).encode()),
        "evaluate.classifier": classifier_digest(evaluate.classifier) if evaluate.classifier else "",
        "network": digest,
    }


@dataclass
class Scores:
    """What is kept of samples while they stream by."""

    sums: FeatureSums
    first: FeatureSums  # of as many samples as the reference has images: distances are comparable only at equal numbers
    agreeing: int = 0
    out_of_range: int = 0
    drawn: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0  # drawing and judging together, in this attempt


def _score(drawing: Drawing, evaluate: EvaluateSettings, stage: Stage, first: int) -> Scores:
    judges = Judges(evaluate.features, evaluate.weights, evaluate.classifier, evaluate.actors, stage.cluster)
    scores = Scores(FeatureSums(DIMENSIONS[evaluate.features]), FeatureSums(DIMENSIONS[evaluate.features]))
    with stage.progress(evaluate.images) as bar:
        for block in scored(draw(drawing, evaluate.images), judges):
            scores.first.merge(FeatureSums.of(block["features"][: max(0, first - scores.sums.count)]))
            scores.sums.merge(FeatureSums.of(block["features"]))
            scores.out_of_range += drawing.left_range(block["out_of_range"])
            scores.drawn += int((block["seconds"] > 0).sum())
            scores.seconds += float(block["seconds"].sum())
            if "predicted" in block:
                scores.agreeing += int((block["predicted"] == block["label"]).sum())
                bar.update(scores.sums.count, label_agreement=scores.agreeing / scores.sums.count)
            else:
                bar.update(scores.sums.count)
        scores.images_per_second = bar.rate
    return scores


def with_reference(
    images: ImageSettings, tokenizer: TokenizerSettings, evaluate: EvaluateSettings, stage: Stage, beside: Iterable[ImageSource] = ()
) -> EvaluateSettings:
    """The same settings with the reference's statistics computed (below `evaluate.path`) and named: many evaluations share them.

    `beside`: sources whose statistics are computed in the same pass, for later.
    """
    digest = network_digest(evaluate.features, evaluate.weights)
    reference = find_reference(images, tokenizer, evaluate, digest)
    if isinstance(reference, FeatureStatistics):
        source_statistics(list(beside), evaluate, digest, stage)
        return evaluate
    source_statistics([reference, *beside], evaluate, digest, stage)
    return replace(evaluate, reference=statistics_path(evaluate, reference, digest))


def _write_picture(drawing: Drawing, evaluate: EvaluateSettings, stage: Stage) -> None:
    shown = grid_samples(evaluate.images, len(drawing.labels))
    parts = [samples.read_samples(evaluate.path, *shard) for shard in samples.shards_there(evaluate.path) if shard[0] < shown]
    images = np.concatenate([part.images for part in parts])[:shown]
    labels = np.concatenate([part.labels for part in parts])[:shown]
    write_grid(storage.join(evaluate.path, PICTURE), images, labels)
