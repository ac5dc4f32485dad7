"""Statistics of image sources: their features go through the scoring actors, are summed by tasks, and kept as a reference file."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipelines.evaluation import npz
from pipelines.evaluation.image_sets.given import npz_images
from pipelines.evaluation.image_sets.sets import ImageSource, RealImages
from pipelines.evaluation.reference_file import Reference, chosen_rows
from pipelines.evaluation.scoring.actor import Judges
from pipelines.evaluation.scoring.feature_shards import KeptFeatures
from pipelines.evaluation.scoring.pairs import rows_at
from pipelines.evaluation.scoring.sources import features_of
from pipelines.evaluation.scoring.sums import sums_of
from pipelines.evaluation.scoring.tasks import Tasks
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import REMEDY, FeatureStatistics
from pipelines.runtime import storage
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.stage import Stage

HERE = 4096  # images of a source up to which its features are summed in this process


def source_statistics(sources: Sequence[ImageSource], evaluate: EvaluateSettings, digest: str, stage: Stage) -> list[FeatureStatistics]:
    """Feature statistics of each source; kept as `evaluate.path/reference-….npz`, so that each is computed once. The files hold spatial
    statistics and features as well (see `Reference`).

    Prints how many images of a source could not be used. Raises UserError where fewer than two could."""
    paths = [statistics_path(evaluate, source, digest) for source in sources]
    missing = {path: source for path, source in zip(paths, sources, strict=True) if not _is_kept(path, stage)}
    if missing:
        require_workers({"evaluate.actors": evaluate.actors}, stage.cluster, cpus_each=0)
        kept = [path.removesuffix(".npz") for path in missing]
        judges = Judges(evaluate.features, evaluate.weights, "", evaluate.actors, stage.cluster, kept)
        found = features_of(list(missing.values()), judges, evaluate.batch, stage)
        for (path, source), features in zip(missing.items(), found, strict=True):
            counts = features.counts() if features.ranges else np.zeros(0, np.int64)
            _check_used(source, int(counts.sum()), stage)
            _write(path, features, counts, evaluate.features, digest)
            storage.delete(features.path)
    return [FeatureStatistics.load(path) for path in paths]


def reference_parts(
    reference: FeatureStatistics | ImageSource, evaluate: EvaluateSettings, digest: str, shape: tuple[int, int], stage: Stage
) -> Reference:
    """What the metrics take of a reference whose statistics are there. Where a statistics file holds images (`arr_0`, as ADM's do) and no
    features, these are computed, once.

    shape: height and width of the samples. Raises UserError where the images of the file are of another size, and DamagedFileError.
    """
    if not isinstance(reference, FeatureStatistics):
        return Reference.load(statistics_path(evaluate, reference, digest), evaluate.features)
    found = Reference.load(evaluate.reference, evaluate.features)
    if "arr_0" not in npz.names(evaluate.reference, REMEDY):
        return found
    images = npz_images(evaluate.reference).in_order()
    if images.shape != tuple(shape):
        raise UserError(
            f"evaluate.reference {evaluate.reference!r} holds images of {images.shape[1]} × {images.shape[0]} pixels, the samples have "
            f"{shape[1]} × {shape[0]}",
            remedy="name a reference of that size",
        )
    if found.features is not None:
        return found
    stage.say(f"features of the {len(images):,} images in {evaluate.reference}")
    source_statistics([images], evaluate, digest, stage)
    own = Reference.load(statistics_path(evaluate, images, digest), evaluate.features)
    return replace(found, features=own.features, lacking={name: why for name, why in found.lacking.items() if name != "features"})


def _write(path: str, features: KeptFeatures, counts: np.ndarray, network: str, digest: str) -> None:
    """The reference file of these features."""
    total = int(counts.sum())
    tasks = Tasks(total <= HERE)
    [sums] = tasks.results([sums_of(features, counts, 0, total, None, tasks)])
    mu, sigma = sums.pooled.moments()
    mu_s, sigma_s = sums.spatial.moments()
    rows = rows_at(features, counts, chosen_rows(total))
    about = {"count": total, "network": network, "digest": digest}
    npz.save(path, {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "features": rows, **about})


def _is_kept(path: str, stage: Stage) -> bool:
    """Whether statistics are there; damaged ones are computed again, which is logged."""
    if not storage.exists(path):
        return False
    try:
        FeatureStatistics.load(path)
        return "features" in npz.names(path, REMEDY)  # an earlier version kept mu and sigma alone
    except DamagedFileError as error:
        stage.say(f"{error.text}; the statistics are computed again")
        return False


def _check_used(source: ImageSource, used: int, stage: Stage) -> None:
    kind = source.identity()["kind"]
    if used < 2:
        raise UserError(
            f"{used} of {len(source):,} {kind} to compare with can be used, expected 2 or more: one image has no covariance",
            remedy="give more of them, or name another evaluate.reference",
        )
    if used < len(source):
        stage.say(f"{len(source) - used:,} of {len(source):,} {kind} to compare with can't be used and are left out of the statistics")


def statistics_path(evaluate: EvaluateSettings, source: ImageSource, digest: str) -> str:
    """Where the statistics of `source` under the network with this digest are kept: named by both. Those of images whose files were
    written again are computed again, for their bytes may have changed."""
    versions = [source.versions()] if isinstance(source, RealImages) else []
    identity = json.dumps([source.identity(), digest, *versions], sort_keys=True)
    return storage.join(evaluate.path, f"reference-{storage.digest(identity.encode())[:16]}.npz")
