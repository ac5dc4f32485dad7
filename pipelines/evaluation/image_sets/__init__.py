"""Sets of images whose features are computed: real images, decoded latents, noise, drawn samples, and samples that others made."""

from pipelines.evaluation.image_sets.sets import (
    Block,
    CachedLatents,
    DrawnSamples,
    ImageSource,
    NoiseImages,
    RealImages,
    ranges,
    read_sources,
)  # fmt: skip

__all__ = ["Block", "CachedLatents", "DrawnSamples", "ImageSource", "NoiseImages", "RealImages", "ranges", "read_sources"]
