"""Where an evaluation's reference comes from."""

from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import MANIFEST
from pipelines.evaluation.features import DIMENSIONS
from pipelines.evaluation.image_sets.sets import CachedLatents, ImageSource, RealImages
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import FeatureStatistics
from pipelines.images.listing import Images, list_images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.tokenizing.directory import require_tokenizer


def find_reference(images: Images, tokenizer_path: str, evaluate: EvaluateSettings, digest: str) -> FeatureStatistics | ImageSource:
    """What `evaluate.reference` names: a statistics file, a latent cache (of the same tokenizer), an image source (all of it), or the
    held-out part of `images`. Raises UserError when it is none, or statistics of another network than the one with this digest."""
    reference = evaluate.reference
    if not reference:
        held_out = images.listing.held_out()
        if not held_out:
            raise UserError(
                f"evaluate.reference is empty and nothing of images.source {images.settings.source!r} is held out",
                remedy="set images.held_out_share or images.held_out_folder, or name statistics, a latent cache or an image source",
            )
        return RealImages(images.settings, held_out)
    if reference.endswith(".npz"):
        return _checked(FeatureStatistics.load(reference), evaluate, digest)
    if storage.exists(storage.join(reference, MANIFEST)):
        require_tokenizer(tokenizer_path, LatentCache(reference).manifest.tokenizer["digest"], f"evaluate.reference {reference!r}")
        return CachedLatents(reference, tokenizer_path)
    whole = ImageSettings(
        source=reference, size=images.settings.size, exif=images.settings.exif, allow_empty_classes=True
    )  # classes play no part
    return RealImages(whole, list_images(whole).rows)


def _checked(statistics: FeatureStatistics, evaluate: EvaluateSettings, digest: str) -> FeatureStatistics:
    found = (statistics.network or "inception", len(statistics.mu))
    expected = (evaluate.features, DIMENSIONS[evaluate.features])
    if found != expected or statistics.digest not in (None, digest):
        raise UserError(
            f"evaluate.reference {evaluate.reference!r} holds statistics of {found[1]} features of {found[0]} "
            f"(digest {(statistics.digest or 'unknown')[:12]}), expected {expected[1]} of {expected[0]} ({digest[:12]})",
            remedy="set evaluate.features, or name images and the statistics are computed",
        )
    return statistics
