"""Metrics of originals and their reconstructions, from kept features and the metrics of the pairs."""

import itertools
from typing import Any

import numpy as np

from pipelines.evaluation.features.sizes import DIMENSIONS
from pipelines.evaluation.metrics import uncertainty
from pipelines.evaluation.metrics.definitions import described, names_of
from pipelines.evaluation.metrics.frechet import FeatureSums, frechet_distance
from pipelines.evaluation.metrics.paired import distance_without, distances_without
from pipelines.evaluation.reconstructions.pixel_metrics import DEFINITIONS, NAMES, NO_WEIGHTS, WINDOW
from pipelines.evaluation.scoring.feature_shards import KeptFeatures
from pipelines.evaluation.scoring.measure import HERE, Measured
from pipelines.evaluation.scoring.pairs import block_bounds, rows_of
from pipelines.evaluation.scoring.sums import Sums, sums_of
from pipelines.evaluation.scoring.tasks import Tasks

ERRORS = (
    f"of the images. Fréchet distance: jackknife over {uncertainty.BLOCKS} blocks of images, left out one by one together with their "
    "reconstructions; PSNR, SSIM and LPIPS: standard deviation of the images' values over the root of their number"
)


def reconstruction_name(features: str) -> str:
    """What the Fréchet distance of reconstructions is called, by the feature network."""
    return "rfid" if features == "inception" else f"reconstruction_{names_of('fid', features)[0]}"


def measure_pairs(originals: KeptFeatures, reconstructions: KeptFeatures, pairs: dict[str, np.ndarray], features: str) -> Measured:
    """The Fréchet distance of the two sets, whose shards hold the same images, and the means of the pairs' metrics (see `read_pairs`)."""
    name, found = reconstruction_name(features), Measured()
    counts = reconstructions.counts()
    total = int(counts.sum())
    tasks = Tasks(total <= HERE)
    bounds = [bound for bound in itertools.pairwise(block_bounds(total)) if bound[0] < bound[1]]
    started = [tuple(sums_of(kept, counts, *bound, None, tasks) for kept in (originals, reconstructions)) for bound in bounds]
    blocks = [tasks.call(_pooled, *both) for both in started]
    value, moments = tasks.results([tasks.call(_whole, *blocks)])[0]
    found.moments, found.values[name] = moments, value
    found.definitions[name] = f"of reconstructions against the same originals: {described('fid', features)}"
    found.errors[name] = float("nan")
    if len(bounds) == uncertainty.BLOCKS:
        if total <= DIMENSIONS[features]:
            first, second = (rows_of(kept, counts, 0, total) for kept in (originals, reconstructions))
            without = distances_without(first, second, bounds)
        else:
            without = np.array(tasks.results([tasks.call(distance_without, number, *blocks) for number in range(len(bounds))]))
        found.errors[name] = uncertainty.jackknife_error(without)
    _add_means(found, pairs)
    return found


def _add_means(found: Measured, pairs: dict[str, np.ndarray]) -> None:
    reasons = {"lpips": NO_WEIGHTS, "ssim": f"the images are smaller than the window of {WINDOW}×{WINDOW} pixels"}
    for metric in NAMES:
        each = pairs[metric]
        if np.isnan(each).any():
            found.left_out[metric] = reasons[metric]
            continue
        found.values[metric], found.definitions[metric] = float(each.mean()), DEFINITIONS[metric]
        few = len(each) < uncertainty.BLOCKS
        found.errors[metric] = float("nan") if few else float(each.std(ddof=1) / np.sqrt(len(each)))


def _pooled(originals: Sums, reconstructions: Sums) -> tuple[FeatureSums, FeatureSums]:
    return originals.pooled, reconstructions.pooled


def _whole(*blocks: tuple[FeatureSums, FeatureSums]) -> tuple[float, FeatureSums]:
    """The distance of all pairs, and the sums of all reconstructions."""
    totals: list[Any] = [FeatureSums(len(blocks[0][0].total)) for _ in (0, 1)]
    for block in blocks:
        for total, part in zip(totals, block, strict=True):
            total.merge(part)
    return frechet_distance(*totals[0].moments(), *totals[1].moments()), totals[1]
