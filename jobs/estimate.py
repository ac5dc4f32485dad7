"""How much disk a configuration will fill, before it does."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.config import RunConfig

# float32 weights, their average, and Adam's two moments
BYTES_A_PARAMETER = 4 + 4 + 8
BYTES_A_VALUE = {"float16": 2, "float32": 4}
PIXEL_CHANNELS = 3


def cache_bytes(config: "RunConfig", images: int) -> int:
    """Moments (2·C, h, w) of every image and of its mirror image."""
    channels, side = latent_shape(config)
    return images * 2 * (2 * channels * side * side) * BYTES_A_VALUE[config.cache.dtype]


def checkpoint_bytes(config: "RunConfig", classes: int) -> int:
    """All checkpoints kept, and the one that is being written."""
    return parameters(config, classes) * BYTES_A_PARAMETER * (config.train.checkpoints_kept + 1)


def sample_bytes(config: "RunConfig") -> int:
    """Samples of an evaluation as uint8 pixels."""
    return config.evaluate.images * config.images.size**2 * PIXEL_CHANNELS


def latent_shape(config: "RunConfig") -> tuple[int, int]:
    """(channels C, side h) of one image's latents."""
    channels = PIXEL_CHANNELS if config.tokenizer.kind == "pixels" else config.tokenizer.channels
    return channels, config.images.size // config.tokenizer.stride


def parameters(config: "RunConfig", classes: int) -> int:
    """Parameters of the model, counted on the model itself (without memory for it)."""
    import torch

    from mar_model import MAR, MARConfig

    channels, side = latent_shape(config)
    sizes = MARConfig(**dataclasses.asdict(config.model), latent_size=side, latent_channels=channels, classes=classes)
    with torch.device("meta"):
        return sum(one.numel() for one in MAR(sizes).parameters())
