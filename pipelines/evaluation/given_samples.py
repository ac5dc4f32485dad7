"""Evaluation of samples that are there already: no checkpoint, tokenizer or cache is needed."""

import json
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.evaluation.classifier.network import check_classes, classifier_digest
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.image_sets.given import find_samples
from pipelines.evaluation.image_sets.readers import GivenSamples
from pipelines.evaluation.metrics.definitions import METRICS
from pipelines.evaluation.record import LABEL_AGREEMENT, LABEL_AGREEMENT_DEFINITION, PICTURE, features_path, has_metrics, write_record
from pipelines.evaluation.references.find import find_reference
from pipelines.evaluation.references.made import reference_parts, source_statistics
from pipelines.evaluation.scoring.actor import Judges
from pipelines.evaluation.scoring.measure import measure, share_error
from pipelines.evaluation.scoring.sources import features_of
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import FeatureStatistics
from pipelines.images.grid import grid_samples, write_grid
from pipelines.images.listing import Images
from pipelines.runtime import storage
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage

NOT_USED = ("evaluate.images",)  # all given samples are evaluated


def evaluate_given(images: Images, tokenizer_path: str, evaluate: EvaluateSettings, stage: Stage) -> dict[str, Any]:
    """Compare the images at `evaluate.samples`, as they are, with the reference. Images of an image source are cropped to their size.

    `evaluate.path` gets `evaluation.json`, `statistics.npz`, `samples.png`, the samples' `features/` and the reference's statistics.
    Returns the summary. Raises UserError for samples that can't be used, missing weights, and a reference that does not fit.
    """
    digest = network_digest(evaluate.features, evaluate.weights)
    given = find_samples(evaluate.samples)
    if evaluate.classifier:
        check_classes(evaluate.classifier, _classes(given, evaluate))
    require_workers({"evaluate.actors": evaluate.actors}, stage.cluster, cpus_each=0)
    reference = find_reference(_of_their_size(images, given, evaluate), tokenizer_path, evaluate, digest)
    identity = {
        **{name: value for name, value in identity_of(evaluate=evaluate).items() if name not in NOT_USED},
        "evaluate.samples": storage.digest(json.dumps(given.identity(), sort_keys=True).encode()),
        "evaluate.reference": storage.digest(json.dumps(reference.identity(), sort_keys=True).encode()),
        "evaluate.classifier": classifier_digest(evaluate.classifier) if evaluate.classifier else "",
        "network": digest,
    }
    finished = stage.begin(evaluate.path, identity, enough=lambda summary: has_metrics(summary, evaluate))
    if finished is not None:
        return finished
    if isinstance(reference, FeatureStatistics):
        count = reference.count
    else:
        stage.say(f"features of {len(reference):,} reference images")
        [statistics] = source_statistics([reference], evaluate, digest, stage)
        count = statistics.count
    known = reference_parts(reference, evaluate, digest, given.shape, stage)
    judges = Judges(
        evaluate.features, evaluate.weights, evaluate.classifier, evaluate.actors, stage.cluster,
        [features_path(evaluate.path, evaluate.features, digest)],
    )  # fmt: skip
    stage.say(f"features of {len(given):,} samples")
    [kept] = features_of([given], judges, evaluate.batch, stage)
    found = measure(kept, evaluate.features, known, evaluate.metrics or list(METRICS))
    if evaluate.classifier:
        numbers = kept.numbers()
        agreeing = numbers["predicted"] == numbers["label"]
        found.values[LABEL_AGREEMENT], found.errors[LABEL_AGREEMENT] = float(agreeing.mean()), share_error(agreeing)
        found.definitions[LABEL_AGREEMENT] = LABEL_AGREEMENT_DEFINITION
    shown = np.arange(grid_samples(len(given), len(np.unique(given.labels))))
    write_grid(storage.join(evaluate.path, PICTURE), given.reader.take(shown), given.labels[shown])
    record = {
        "reference": {**reference.identity(), "images": count},
        "network": {"name": evaluate.features, "digest": digest},
        "seed": stage.seed,
        "samples": {"path": evaluate.samples, "height": given.shape[0], "width": given.shape[1], **given.about},
        "identity": identity,
    }
    return write_record(found, {}, record, given.labels, evaluate, stage)


def _of_their_size(images: Images, given: GivenSamples, evaluate: EvaluateSettings) -> Images:
    """The image source, its images cropped to the samples' size. Raises UserError for samples that no square crop fits."""
    if evaluate.reference.endswith(".npz"):
        return images
    height, width = given.shape
    if height != width:
        raise UserError(
            f"evaluate.samples {evaluate.samples!r} are {width} × {height} pixels, and images of a source are cropped to squares",
            remedy="name an .npz of reference statistics in evaluate.reference, or crop the samples",
        )
    return Images(replace(images.settings, size=height))


def _classes(given: GivenSamples, evaluate: EvaluateSettings) -> int:
    if given.labels.min() < 0:
        raise UserError(
            f"evaluate.classifier is given, but evaluate.samples {evaluate.samples!r} has no labels",
            remedy="give one folder a class, or leave evaluate.classifier empty",
        )
    return max(len(given.class_names), int(given.labels.max()) + 1)
