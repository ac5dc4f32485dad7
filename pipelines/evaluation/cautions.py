"""How many images a number needs, and the caution that stands beside the number where there were fewer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.features import DIMENSIONS
from pipelines.evaluation.features.inception import INCEPTION_DIGEST

PUBLISHED_FEWEST = 10_000  # samples that a published number is of at least
ROW_IMAGES = "images in each row of the comparison"
FEW_IMAGES = 300  # two sets of so many real images of the demo have a distance of 12 (100 images: 27, 50 images: 36); its model has 55


def of_distance(counts: Mapping[str, int | None], features: str) -> str:
    """What to say beside a Fréchet distance in this feature network; empty where every count is at least the number of features.

    `counts`: of images, by what they are ("samples"); None where it is unknown.
    """
    dimension = DIMENSIONS[features]
    few = {name: count for name, count in counts.items() if count is not None and count < dimension}
    if not few:
        return ""
    listed = " and ".join(f"{count:,} {name}" for name, count in few.items())
    if min(few.values()) < FEW_IMAGES:
        return (
            f"warning: {listed} are far too few: below {FEW_IMAGES} images most of a Fréchet distance is the error of its estimate; "
            "draw no conclusion from it"
        )
    return (
        f"caution: {listed} are fewer than the {dimension:,} features: the covariance is singular and the Fréchet distance too large; "
        "compare it only with distances of equal numbers of images"
    )


def of_distance_in_short(counts: Mapping[str, int | None], features: str) -> str:
    """The same in a few words, for a line that is printed again and again."""
    if not (text := of_distance(counts, features)):
        return ""
    if text.startswith("warning"):
        return "warning: far too few images"
    return f"caution: fewer images than the {DIMENSIONS[features]:,} features"


def of_label_agreement(samples: int) -> str:
    """What to say beside a label agreement; empty from FEW_IMAGES samples on."""
    if samples >= FEW_IMAGES:
        return ""
    error = 50 / math.sqrt(samples)  # where half of them agree
    return f"caution: the label agreement of {samples:,} samples has a standard error of up to {error:.0f} percentage points"


def of_evaluation(figures: Mapping[str, Any]) -> list[str]:
    """The cautions for an evaluation with these figures (those of its summary)."""
    found = [of_network(figures)]
    if figures.get("features") in DIMENSIONS:
        counts = {"samples": figures.get("images"), "reference images": figures.get("reference_images")}
        found.append(of_distance(counts, figures["features"]))
        found.append(of_few_samples(figures["images"], figures["features"]))
    if figures.get("label_agreement") is not None:
        found.append(of_label_agreement(figures["images"]))
    return [text for text in found if text]


def of_network(figures: Mapping[str, Any]) -> str:
    """What to say where the network's weights, `network` (their digest), are not the published ones."""
    digest = str(figures.get("network") or "")
    if figures.get("features") != "inception" or not digest or digest.startswith(INCEPTION_DIGEST):
        return ""
    found = f"the weights of Inception have the digest {digest[:8]}, the published ones {INCEPTION_DIGEST}"
    return f"warning: {found}: no number here is comparable with published ones"


def of_few_samples(images: int, features: str) -> str:
    """What to say beside metrics of enough samples for a distance, but of fewer than are published anywhere."""
    if features != "inception" or not DIMENSIONS[features] <= images < PUBLISHED_FEWEST:
        return ""
    return f"caution: published numbers are of 50,000 samples; those of {images:,} are not comparable with them"


def of_classes(labels: np.ndarray) -> str:
    """What to say where classes were drawn unequally often. labels: (N,), −1 where unknown."""
    if not len(labels) or labels.min() < 0:
        return ""
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    if counts.max() <= counts.min() + 1:
        return ""
    return f"caution: classes have from {counts.min():,} to {counts.max():,} samples; published numbers are of equal numbers of each class"


def of_run(run: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cautions for a run's evaluations and for the comparison of the quickstart, by their summaries."""
    found = [text for one in evaluations for text in of_evaluation(one)]
    if "frechet_images" in run and evaluations and evaluations[-1].get("features") in DIMENSIONS:
        found.append(of_distance({ROW_IMAGES: run["frechet_images"]}, evaluations[-1]["features"]))
    return [text for text in dict.fromkeys(found) if text]
