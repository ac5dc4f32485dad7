"""The metrics by name: what each is, with which parameters, and where it is published."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.evaluation.features.sizes import LOGITS, SPATIAL
from pipelines.evaluation.metrics import inception_score, kid, precision_recall
from pipelines.runtime.errors import UserError


@dataclass(frozen=True)
class Metric:
    """One family of numbers. `names`: with Inception, as published; `other_names`: with another feature network, whose name follows."""

    names: tuple[str, ...]
    other_names: tuple[str, ...]
    definition: str
    source: str
    parameters: dict[str, Any]
    needs: tuple[str, ...]  # of the reference: `pooled` or `spatial` statistics, `features`
    of_samples: tuple[str, ...] = ()  # of the samples alone: `logits`


_TORCH_FIDELITY = "as torch-fidelity 0.4 computes it"

FD_DINOV2 = "fd_dinov2"  # as it is published

METRICS = {
    "fid": Metric(
        ("fid",),
        ("frechet_distance",),
        "Fréchet distance |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of pooled features, covariances divided by N − 1",
        "arXiv 1706.08500, eq. 6",
        {},
        ("pooled",),
    ),
    "sfid": Metric(
        ("sfid",),
        ("spatial_frechet_distance",),
        "the same distance of the first 7 channels of a layer in the middle, flattened height, width, channel; for Inception "
        "mixed_6/conv:0[..., :7], 2,023 values",
        "arXiv 2103.03841, as ADM's evaluation suite computes it",
        {},
        ("spatial",),
    ),
    "inception_score": Metric(
        ("inception_score_mean", "inception_score_std"),
        ("class_score_mean", "class_score_std"),
        "exp(mean KL(p(y|x) ‖ p(y))) of each split of the shuffled samples, logits without bias: mean and population standard deviation",
        f"arXiv 1606.03498, {_TORCH_FIDELITY}",
        {"splits": inception_score.SPLITS, "seed": inception_score.SEED},
        (),
        ("logits",),
    ),
    "kid": Metric(
        ("kid_mean", "kid_std"),
        ("kernel_distance_mean", "kernel_distance_std"),
        "unbiased MMD² with the kernel (x·y/d + 1)³ of random subsets without replacement: mean and population standard deviation",
        f"arXiv 1801.01401, {_TORCH_FIDELITY}",
        {"subsets": kid.SUBSETS, "subset_size": kid.SUBSET_SIZE, "seed": kid.SEED},
        ("features",),
    ),
    "precision": Metric(
        ("precision",),
        ("precision",),
        "share of samples that lie in the ball of a reference image, whose radius is the distance to its 3rd neighbour",
        "arXiv 1904.06991, of pooled features as in ADM's evaluation suite",
        {"neighbours": precision_recall.NEIGHBOURS},
        ("features",),
    ),
    "recall": Metric(
        ("recall",),
        ("recall",),
        "share of reference images that lie in the ball of a sample, whose radius is the distance to its 3rd neighbour",
        "arXiv 1904.06991, of pooled features as in ADM's evaluation suite",
        {"neighbours": precision_recall.NEIGHBOURS},
        ("features",),
    ),
}


def names_of(metric: str, features: str) -> tuple[str, ...]:
    """What the numbers of a metric are called, by the feature network: only Inception's have the published names."""
    found = METRICS[metric]
    if features == "dinov2" and metric == "fid":
        return (FD_DINOV2,)
    return found.names if features == "inception" else tuple(f"{name}_{features}" for name in found.other_names)


def metrics_of(features: str) -> list[str]:
    """The metrics that the feature network allows."""
    lacking = {"spatial": not SPATIAL[features], "logits": not LOGITS[features]}
    return [name for name, metric in METRICS.items() if not any(lacking.get(part) for part in (*metric.needs, *metric.of_samples))]


def wanted_metrics(asked: Sequence[str], features: str) -> list[str]:
    """The metrics in `asked` (`evaluate.metrics`), or all that the feature network allows if it is empty. Raises UserError for others."""
    allowed = metrics_of(features)
    for metric in asked:
        if metric not in allowed:
            raise UserError(
                f"evaluate.metrics names {metric}, which the feature network {features} does not allow",
                remedy=f"it allows {', '.join(allowed)}",
            )
    return list(asked) or allowed


def described(metric: str, features: str, parameters: dict[str, Any] | None = None) -> str:
    """One line for the record: definition, parameters (those given in place of the published), feature network, source."""
    found = METRICS[metric]
    used = {**found.parameters, **(parameters or {})}
    listed = "; " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in used.items()) if used else ""
    published = features == "inception" or names_of(metric, features) == (FD_DINOV2,)
    compared = "" if published else "; not comparable with published numbers"
    return f"{found.definition} ({found.source}){listed}; features of {features}{compared}"
