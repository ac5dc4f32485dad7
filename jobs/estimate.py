"""How many bytes a configuration will fill, before it does."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig
    from mar_model.config import MARConfig

BYTES_A_VALUE = {"float16": 2, "float32": 4}
PIXEL_CHANNELS = 3


def cache_bytes(config: "RunConfig", images: int) -> int:
    """Moments (2·C, h, w) of every image and of its mirror image."""
    return images * 2 * record_bytes(config)


def record_bytes(config: "RunConfig") -> int:
    """Moments of one image: what a training step reads of it, with or without the mirror image beside."""
    channels, side = latent_shape(config)
    return 2 * channels * side * side * BYTES_A_VALUE[config.cache.dtype]


def checkpoint_bytes(config: "RunConfig", classes: int) -> int:
    """All checkpoints that a whole run keeps at once."""
    return parameters(config, classes) * bytes_a_parameter(config) * sum(checkpoints_on_disk(config).values())


def checkpoints_on_disk(config: "RunConfig") -> dict[str, int]:
    """How many there are at the end of a run, by why they are kept."""
    train = config.train
    found = {"kept (train.checkpoints_kept)": train.checkpoints_kept, "the best (train.keep_best)": int(bool(train.keep_best))}
    found["for good (train.keep_every_images)"] = train.images // train.keep_every_images if train.keep_every_images else 0
    return {**found, "being written": 1}


def bytes_a_parameter(config: "RunConfig") -> int:
    """In a checkpoint, all float32: weights, their averages, and Adam's two moments."""
    return 4 * (1 + 1 + len(config.train.ema_decays) + 2)


def sample_bytes(config: "RunConfig") -> int:
    """Samples of an evaluation as uint8 pixels."""
    return config.evaluate.images * config.images.size**2 * PIXEL_CHANNELS


def latent_shape(config: "RunConfig") -> tuple[int, int]:
    """(channels C, side h) of one image's latents."""
    channels = PIXEL_CHANNELS if config.tokenizer.kind == "pixels" else config.tokenizer.channels
    return channels, config.images.size // config.tokenizer.stride


def model_config(config: "RunConfig", classes: int) -> "MARConfig":
    """The model's whole configuration, from the tokenizer's where there is no cache yet to determine it."""
    from mar_model import MARConfig

    channels, side = latent_shape(config)
    return MARConfig(**dataclasses.asdict(config.model), latent_size=side, latent_channels=channels, classes=classes)


def parameters(config: "RunConfig", classes: int) -> int:
    """Parameters of the model."""
    from mar_model.training.footprint import parameter_count

    return parameter_count(model_config(config, classes))
