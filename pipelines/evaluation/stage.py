"""Stage *evaluate*: samples → feature network → kept features → metrics."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipelines.evaluation.classifier.network import check_classes, classifier_digest
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.given_samples import evaluate_given
from pipelines.evaluation.image_sets.sets import DrawnSamples, ImageSource, RealImages
from pipelines.evaluation.metrics.definitions import METRICS
from pipelines.evaluation.record import (
    LABEL_AGREEMENT,
    LABEL_AGREEMENT_DEFINITION,
    PICTURE,
    check_count,
    features_path,
    has_metrics,
    metric_name,
    write_record,
)  # fmt: skip
from pipelines.evaluation.references.find import find_reference
from pipelines.evaluation.references.made import reference_parts, source_statistics, statistics_path
from pipelines.evaluation.scoring.actor import Judges, scored
from pipelines.evaluation.scoring.feature_shards import KeptFeatures
from pipelines.evaluation.scoring.measure import HERE, measure, share_error
from pipelines.evaluation.scoring.sums import sums_of
from pipelines.evaluation.scoring.tasks import Tasks
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import FeatureStatistics, distance
from pipelines.generation import samples
from pipelines.generation.dataset import draw
from pipelines.generation.drawing import Drawing, range_warning
from pipelines.generation.planning import plan_drawing
from pipelines.generation.settings import GenerateSettings
from pipelines.images.grid import grid_samples, write_grid
from pipelines.images.listing import Images
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage

NOT_USED = ("generate.images", "generate.labels", "generate.samples", "generate.keep_pixels")  # it draws evaluate.images, of all classes


def evaluate(
    images: Images, tokenizer_path: str, train_path: str, generate: GenerateSettings, evaluate: EvaluateSettings, stage: Stage
) -> dict[str, Any]:
    """Draw `evaluate.images` samples, every class in turn, and compare them with the reference; with `evaluate.samples` compare those
    (see `evaluate_given`) and draw none.

    `evaluate.path` gets `evaluation.json`, `statistics.npz` (mu, sigma of the samples), `samples.png`, the samples' `shards/`, their
    `features/` and the reference's statistics. Returns the summary: the metrics by name, the Fréchet distance also as
    `frechet_distance`, and where a classifier is given `label_agreement`; `caution` where the images are too few for these.
    A finished evaluation that lacks one of `evaluate.metrics` computes it from the kept features. Raises UserError for missing weights,
    checkpoint, reference or classifier, and for fewer than two samples.
    """
    if evaluate.samples:
        return evaluate_given(images, tokenizer_path, evaluate, stage)
    check_count("evaluate.images", evaluate.images)
    generate = replace(generate, precision=resolved(generate.precision, stage.cluster))
    digest = network_digest(evaluate.features, evaluate.weights)
    drawing = plan_drawing(evaluate.path, tokenizer_path, train_path, generate, stage)
    if evaluate.classifier:
        check_classes(evaluate.classifier, len(drawing.labels))
    require_workers({"generate.actors": generate.actors}, stage.cluster)
    require_workers({"generate.actors": generate.actors, "evaluate.actors": evaluate.actors}, stage.cluster, cpus_each=0)
    reference = find_reference(images, tokenizer_path, evaluate, digest)
    identity = {**scoring_identity(reference, generate, evaluate, digest), **drawing.identity}
    finished = stage.begin(evaluate.path, identity, enough=lambda summary: has_metrics(summary, evaluate))
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

    known = reference_parts(reference, evaluate, digest, (drawing.state["image_size"],) * 2, stage)
    scores = _score(drawing, evaluate, digest, stage)
    found = measure(scores.kept, evaluate.features, known, evaluate.metrics or list(METRICS))
    if evaluate.classifier:
        found.values[LABEL_AGREEMENT] = float(scores.agreeing.mean())
        found.errors[LABEL_AGREEMENT] = share_error(scores.agreeing)
        found.definitions[LABEL_AGREEMENT] = LABEL_AGREEMENT_DEFINITION
    assert found.moments is not None
    samples_statistics = FeatureStatistics.of(found.moments, evaluate.features, digest)
    first = _first(scores.kept, min(evaluate.images, real.count or evaluate.images), samples_statistics)
    first.save(statistics_path(evaluate, DrawnSamples(evaluate.path, first.count or 0, identity), digest))
    _write_picture(drawing, evaluate, stage)
    if scores.out_of_range:
        stage.say(range_warning(scores.out_of_range, evaluate.images, drawing))
    name = metric_name(evaluate.features)
    equal = found.values.get(name) if first is samples_statistics else None
    record = {
        "at_equal_numbers": {"images": first.count, name: distance(first, real) if equal is None else equal},
        "reference": {**reference.identity(), "images": real.count},
        "network": {"name": evaluate.features, "digest": digest},
        "seed": stage.seed,
        "generation": {**asdict(generate), "checkpoint": drawing.checkpoint, "images_seen": drawing.state["images_seen"]},
        "identity": identity,
    }
    speed = {**drawing.speed(scores.drawn, scores.seconds), "images_per_second": scores.images_per_second}
    labels = drawing.labels_of(range(evaluate.images))
    return write_record(found, {"out_of_range": scores.out_of_range, **speed}, record, labels, evaluate, stage)


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
    """What is known of the samples once all are drawn and judged."""

    kept: KeptFeatures
    agreeing: np.ndarray  # (N,) bool: whether the classifier sees the class asked for
    out_of_range: int
    drawn: int
    seconds: float
    images_per_second: float  # drawing and judging together, in this attempt


def _score(drawing: Drawing, evaluate: EvaluateSettings, digest: str, stage: Stage) -> Scores:
    path = features_path(evaluate.path, evaluate.features, digest)
    judges = Judges(evaluate.features, evaluate.weights, evaluate.classifier, evaluate.actors, stage.cluster, [path])
    ranges, agreeing, out_of_range, drawn, seconds, done = [], [], 0, 0, 0.0, 0
    with stage.progress(evaluate.images) as bar:
        for block in scored(draw(drawing, evaluate.images), judges):
            ranges.append((int(block["start"][0]), int(block["stop"][0])))
            agreeing.append(block["predicted"] == block["label"])
            out_of_range += drawing.left_range(block["out_of_range"])
            drawn += int((block["seconds"] > 0).sum())
            seconds += float(block["seconds"].sum())
            done += len(block["index"])
            agreement = {LABEL_AGREEMENT: float(np.concatenate(agreeing).mean())} if evaluate.classifier else {}
            bar.update(done, **agreement)
        rate = bar.rate
    return Scores(KeptFeatures(path, tuple(sorted(ranges))), np.concatenate(agreeing), out_of_range, drawn, seconds, rate)


def _first(kept: KeptFeatures, count: int, whole: FeatureStatistics) -> FeatureStatistics:
    """Statistics of the first `count` samples: distances are comparable only at equal numbers."""
    if count == whole.count:
        return whole
    tasks = Tasks(count <= HERE)
    [sums] = tasks.results([sums_of(kept, kept.counts(), 0, count, None, tasks)])
    assert whole.network is not None
    assert whole.digest is not None
    return FeatureStatistics.of(sums.pooled, whole.network, whole.digest)


def with_reference(
    images: Images, tokenizer_path: str, evaluate: EvaluateSettings, stage: Stage, beside: Iterable[ImageSource] = ()
) -> EvaluateSettings:
    """The same settings with the reference's statistics computed (below `evaluate.path`) and named: many evaluations share them.

    `beside`: sources whose statistics are computed in the same pass, for later.
    """
    digest = network_digest(evaluate.features, evaluate.weights)
    reference = find_reference(images, tokenizer_path, evaluate, digest)
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
