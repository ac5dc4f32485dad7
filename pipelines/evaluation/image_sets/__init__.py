"""Sets of images whose features are computed: real images, decoded latents, noise, drawn samples, and samples that others made."""

from pipelines.evaluation.image_sets.sets import (
    Block,
    CachedLatents,
    DrawnSamples,
    ImageSource,
    NoiseImages,
    RealImages,
    ReconstructedImages,
    ranges,
    read_sources,
)

__all__ = [
    "Block",
    "CachedLatents",
    "DrawnSamples",
    "ImageSource",
    "NoiseImages",
    "RealImages",
    "ReconstructedImages",
    "ranges",
    "read_sources",
]
