"""The metrics by name: what each is, with which parameters, and where it is published."""

from dataclasses import dataclass
from typing import Any

from pipelines.evaluation.metrics import inception_score, kid, precision_recall


@dataclass(frozen=True)
class Metric:
    """One family of numbers. `names`: with Inception, as published; `other_names`: with another feature network, whose name follows."""

    names: tuple[str, ...]
    other_names: tuple[str, ...]
    definition: str
    source: str
    parameters: dict[str, Any]
    needs: tuple[str, ...]  # of the reference: `pooled` or `spatial` statistics, `features`


_TORCH_FIDELITY = "as torch-fidelity 0.4 computes it"

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
    return found.names if features == "inception" else tuple(f"{name}_{features}" for name in found.other_names)


def described(metric: str, features: str, parameters: dict[str, Any] | None = None) -> str:
    """One line for the record: definition, parameters (those given in place of the published), feature network, source."""
    found = METRICS[metric]
    used = {**found.parameters, **(parameters or {})}
    listed = "; " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in used.items()) if used else ""
    compared = "" if features == "inception" else "; not comparable with published numbers"
    return f"{found.definition} ({found.source}){listed}; features of {features}{compared}"
