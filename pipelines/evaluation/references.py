"""What samples are compared with: where an evaluation's reference comes from, and its statistics, computed once and kept."""

import json

from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import MANIFEST
from pipelines.evaluation.features import DIMENSIONS
from pipelines.evaluation.image_sets import CachedLatents, ImageSource, RealImages, read_sources
from pipelines.evaluation.scoring import Judges, scored
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import FeatureStatistics, FeatureSums
from pipelines.images.listing import list_images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import tokenizer_digest
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.tokenizing.stage import check_tokenizer_files


def find_reference(
    images: ImageSettings, tokenizer: TokenizerSettings, evaluate: EvaluateSettings, digest: str
) -> FeatureStatistics | ImageSource:
    """What `evaluate.reference` names: a statistics file, a latent cache (of the same tokenizer), an image source (all of it), or the
    held-out part of `images`. Raises UserError when it is none, or statistics of another network than the one with this digest."""
    reference = evaluate.reference
    if not reference:
        held_out = list_images(images).held_out()
        if not held_out:
            raise UserError(
                f"evaluate.reference is empty and nothing of images.source {images.source!r} is held out; set images.held_out_share or "
                "images.held_out_folder, or name statistics, a latent cache or an image source"
            )
        return RealImages(images, held_out)
    if reference.endswith(".npz"):
        return _checked(FeatureStatistics.load(reference), evaluate, digest)
    if storage.exists(storage.join(reference, MANIFEST)):
        found, expected = tokenizer_digest(tokenizer.path), LatentCache(reference).manifest.tokenizer["digest"]
        if found != expected:
            check_tokenizer_files(tokenizer.path)  # the files may be damaged
            raise UserError(
                f"evaluate.reference {reference!r} was written with the tokenizer {expected[:12]}…, but tokenizer.path "
                f"{tokenizer.path!r} holds {found[:12]}…; name that tokenizer, or another reference"
            )
        return CachedLatents(reference, tokenizer.path)
    whole = ImageSettings(source=reference, size=images.size, exif=images.exif, allow_empty_classes=True)  # classes play no part
    return RealImages(whole, list_images(whole).rows)


def _checked(statistics: FeatureStatistics, evaluate: EvaluateSettings, digest: str) -> FeatureStatistics:
    found = (statistics.network or "inception", len(statistics.mu))
    expected = (evaluate.features, DIMENSIONS[evaluate.features])
    if found != expected or statistics.digest not in (None, digest):
        raise UserError(
            f"evaluate.reference {evaluate.reference!r} holds statistics of {found[1]} features of {found[0]} "
            f"(digest {(statistics.digest or 'unknown')[:12]}), expected {expected[1]} of {expected[0]} ({digest[:12]}); "
            "set evaluate.features, or name images and the statistics are computed"
        )
    return statistics


def source_statistics(sources: list[ImageSource], evaluate: EvaluateSettings, digest: str, stage: Stage) -> list[FeatureStatistics]:
    """Feature statistics of each source; kept as `evaluate.path/reference-….npz`, so that each is computed once.

    Prints how many images of a source could not be used. Raises UserError where fewer than two could."""
    paths = [statistics_path(evaluate, source, digest) for source in sources]
    missing = {path: source for path, source in zip(paths, sources, strict=True) if not _is_kept(path, stage)}
    if missing:
        require_workers({"evaluate.actors": evaluate.actors}, stage.cluster, cpus_each=0)
        judges = Judges(evaluate.features, evaluate.weights, "", evaluate.actors, stage.cluster)
        sums = [FeatureSums(DIMENSIONS[evaluate.features]) for _ in missing]
        dataset = read_sources(list(missing.values()), evaluate.batch)
        with stage.progress(sum(len(source) for source in missing.values())) as bar:
            for block in scored(dataset, judges):
                if len(block["source"]):
                    sums[int(block["source"][0])].merge(FeatureSums.of(block["features"]))
                bar.update(sum(one.count for one in sums))
        for (path, source), one in zip(missing.items(), sums, strict=True):
            _check_used(source, one.count, stage)
            FeatureStatistics.of(one, evaluate.features, digest).save(path)
    return [FeatureStatistics.load(path) for path in paths]


def _is_kept(path: str, stage: Stage) -> bool:
    """Whether statistics are there; damaged ones are computed again, which is logged."""
    if not storage.exists(path):
        return False
    try:
        FeatureStatistics.load(path)
    except DamagedFileError as error:
        stage.say(f"{str(error).partition(';')[0]}; the statistics are computed again")
        return False
    return True


def _check_used(source: ImageSource, used: int, stage: Stage) -> None:
    kind = source.identity()["kind"]
    if used < 2:
        raise UserError(
            f"{used} of {len(source):,} {kind} to compare with can be used, expected 2 or more: one image has no covariance; "
            "give more of them, or name another evaluate.reference"
        )
    if used < len(source):
        stage.say(f"{len(source) - used:,} of {len(source):,} {kind} to compare with can't be used and are left out of the statistics")


def statistics_path(evaluate: EvaluateSettings, source: ImageSource, digest: str) -> str:
    """Where the statistics of `source` under the network with this digest are kept: named by both. Those of images whose files were
    written again are computed again, for their bytes may have changed."""
    versions = [source.versions()] if isinstance(source, RealImages) else []
    identity = json.dumps([source.identity(), digest, *versions], sort_keys=True)
    return storage.join(evaluate.path, f"reference-{storage.digest(identity.encode())[:16]}.npz")
