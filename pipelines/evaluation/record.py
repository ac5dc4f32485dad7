"""The evaluation record: its files, its fields and the definitions of its metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.evaluation import cautions
from pipelines.evaluation.metrics.definitions import names_of
from pipelines.evaluation.scoring.measure import ERRORS, Measured
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import FeatureStatistics
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import null_for_nan
from pipelines.runtime.stage import Stage

STATISTICS, RECORD, PICTURE, FEATURES = "statistics.npz", "evaluation.json", "samples.png", "features"

FORMAT_VERSION = 2  # 1: a Fréchet distance and label agreement alone
LABEL_AGREEMENT = "label_agreement"
LABEL_AGREEMENT_DEFINITION = "share of samples that the classifier assigns to the class they were drawn for"


def metric_name(features: str) -> str:
    """What a Fréchet distance is called, by its feature network: only Inception's is the FID."""
    return names_of("fid", features)[0]


def check_count(setting: str, images: int) -> None:
    """Raise UserError for a number of samples that has no covariance."""
    if images < 2:
        raise UserError(f"{setting} is {images}, expected 2 or more: one image has no covariance")


@dataclass(frozen=True)
class Record:
    """What is read again of `evaluation.json`."""

    images: int
    identity: dict[str, Any]


def write_record(
    found: Measured, figures: dict[str, Any], record: dict[str, Any], labels: np.ndarray, evaluate: EvaluateSettings, stage: Stage
) -> dict[str, Any]:
    """Write the record, the statistics and the summary, which is returned; print what to keep in mind about the numbers.

    `figures`: more values for both, `record`: for the record alone, with `reference` (and its `images`), `network` and `identity`.
    labels: of the samples, (N,), −1 where unknown.
    """
    assert found.moments is not None
    FeatureStatistics.of(found.moments, evaluate.features, record["network"]["digest"]).save(storage.join(evaluate.path, STATISTICS))
    count, reference_images = found.moments.count, record["reference"]["images"]
    figures = {"images": count, **found.values, **figures}
    known = {"features": evaluate.features, "reference_images": reference_images, "network": record["network"]["digest"]}
    cautioned = [*cautions.of_evaluation({**figures, **known}), *filter(None, [cautions.of_classes(labels)])]
    for caution in cautioned:
        stage.say(caution)
    for reason in dict.fromkeys(found.left_out.values()):
        stage.say(f"left out: {', '.join(name for name, why in found.left_out.items() if why == reason)}: {reason}")
    if cautioned:
        figures["caution"] = "; ".join(cautioned)
    written = {
        "format_version": FORMAT_VERSION,
        **figures,
        "metrics": found.values,
        "standard_errors": found.errors,
        "standard_error_method": ERRORS,
        "extrapolated": found.extrapolated,
        "left_out": found.left_out,
        "definitions": found.definitions,
        **record,
    }
    storage.write_json(storage.join(evaluate.path, RECORD), null_for_nan(written))
    for file in (RECORD, PICTURE):
        if storage.exists(storage.join(evaluate.path, file)):
            stage.artifact(storage.join(evaluate.path, file))
    name = metric_name(evaluate.features)
    return stage.complete(
        evaluate.path,
        record["identity"],
        {
            **figures,
            **{f"{metric}_standard_error": error for metric, error in found.errors.items()},
            **{f"{metric}_extrapolated": value for metric, value in found.extrapolated.items()},
            **({"frechet_distance": found.values[name]} if name in found.values else {}),
            **({"left_out": sorted(found.left_out)} if found.left_out else {}),
            **known,
        },
    )


def has_metrics(summary: Mapping[str, Any], evaluate: EvaluateSettings) -> bool:
    """Whether a finished evaluation with this summary has every one of `evaluate.metrics`, or has said why it can't."""
    known = {*summary, *summary.get("left_out", ())}
    return known.issuperset(name for metric in evaluate.metrics for name in names_of(metric, evaluate.features))


def features_path(path: str, features: str, digest: str) -> str:
    """Where the features of the samples of an evaluation are kept, by the feature network."""
    return storage.join(path, FEATURES, f"{features}-{digest[:12]}")
