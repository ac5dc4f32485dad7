"""What a reference file holds, part by part: a metric takes those that it needs, and says which is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.evaluation import npz
from pipelines.evaluation.features.sizes import DIMENSIONS, SPATIAL
from pipelines.evaluation.metrics.class_means import ClassMeans
from pipelines.evaluation.statistics import REMEDY
from pipelines.runtime.records import damaged

MOST_FEATURES = 10_000  # images of a reference whose features are kept: as many as ADM's file holds for precision and recall
SEED = 2020
CLASS_ARRAYS = ("class_names", "class_counts", "class_means", "class_noise")  # see `ClassMeans`


@dataclass(frozen=True)
class Reference:
    """Statistics and features of reference images. `lacking`: why a part is missing, by `pooled`, `spatial` or `features`."""

    pooled: tuple[np.ndarray, np.ndarray]  # mu (D,), sigma (D, D)
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    features: np.ndarray | None = None  # (M, D) float32
    lacking: Mapping[str, str] = field(default_factory=dict)
    index: np.ndarray | None = None  # (M,) int64: the number in its source of each image whose features are kept
    classes: tuple[Sequence[str], ClassMeans] | None = None  # names of the classes, and their means

    @classmethod
    def load(cls, path: str, features: str) -> "Reference":
        """A file of ours, ADM's, or the release's `fid_stats`, for the network `features`.

        Raises DamagedFileError for parts of other shapes than the network's, and for values that are not finite.
        """
        arrays = npz.read(path, ("mu", "sigma", "mu_s", "sigma_s", "features", "index", *CLASS_ARRAYS), REMEDY)
        _check(path, "mu", arrays.get("mu"), DIMENSIONS[features])
        lacking = {}
        spatial = None
        if "mu_s" in arrays and "sigma_s" in arrays:
            _check(path, "mu_s", arrays["mu_s"], SPATIAL[features])
            spatial = arrays["mu_s"].astype(np.float64), arrays["sigma_s"].astype(np.float64)
            _check_finite(path, {"mu_s": spatial[0], "sigma_s": spatial[1]})
        else:
            lacking["spatial"] = f"the reference {path} holds no mu_s and sigma_s"
        kept = arrays.get("features")
        if kept is None:
            lacking["features"] = f"the reference {path} holds neither features nor images (arr_0)"
        else:
            _check(path, "features", kept[0] if len(kept) else None, DIMENSIONS[features])
            _check_finite(path, {"features": kept})
        pooled = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
        return cls(pooled, spatial, kept, lacking, arrays.get("index"), _classes(path, arrays, DIMENSIONS[features]))


def chosen_rows(count: int) -> np.ndarray:
    """Of `count` reference images those whose features are kept: all, or MOST_FEATURES drawn at random; sorted, (M,) int64."""
    if count <= MOST_FEATURES:
        return np.arange(count)
    return np.sort(np.random.RandomState(SEED).permutation(count)[:MOST_FEATURES])


def _classes(path: str, arrays: Mapping[str, np.ndarray], dimension: int) -> tuple[list[str], ClassMeans] | None:
    if any(name not in arrays for name in CLASS_ARRAYS):
        return None
    names, counts, means, noise = (arrays[name] for name in CLASS_ARRAYS)
    if not len(names) == len(counts) == len(means) == len(noise) or means.shape[1:] != (dimension,):
        raise damaged(path, f"it holds {len(names)} classes and class_means of shape {means.shape}", REMEDY)
    return names.tolist(), ClassMeans(counts, means.astype(np.float64), noise)


def _check(path: str, name: str, values: np.ndarray | None, dimension: int) -> None:
    if values is None or values.shape != (dimension,):
        found: Any = "is missing" if values is None else f"has the shape {values.shape}"
        raise damaged(path, f"{name} {found}, expected {dimension:,} values", REMEDY)


def _check_finite(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise damaged(path, f"{name} holds values that are not finite", REMEDY)
