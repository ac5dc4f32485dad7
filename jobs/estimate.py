"""The disk space that a configuration needs."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig
    from mar_model.config import MARConfig

BYTES_A_VALUE = {"float16": 2, "float32": 4}
PIXEL_CHANNELS = 3


def cache_bytes(config: "RunConfig", images: int) -> int:
    """Bytes of the moments (2·C, h, w) of all images and their mirror images."""
    return images * 2 * record_bytes(config)


def record_bytes(config: "RunConfig") -> int:
    """Bytes of the moments of one image, which is what a training step reads per image."""
    channels, side = latent_shape(config)
    return 2 * channels * side * side * BYTES_A_VALUE[config.cache.dtype]


def checkpoint_bytes(config: "RunConfig", classes: int) -> int:
    """Bytes of all checkpoints that exist at the same time at the end of a run."""
    return parameters(config, classes) * bytes_a_parameter(config) * sum(checkpoints_on_disk(config).values())


def checkpoints_on_disk(config: "RunConfig") -> dict[str, int]:
    """The number of checkpoints at the end of a run, by the reason for which they are kept."""
    train = config.train
    found = {"kept (train.checkpoints_kept)": train.checkpoints_kept, "the best (train.keep_best)": int(bool(train.keep_best))}
    found["permanent (train.keep_every_images)"] = train.images // train.keep_every_images if train.keep_every_images else 0
    return {**found, "being written": 1}


def bytes_a_parameter(config: "RunConfig") -> int:
    """Bytes per parameter of a checkpoint, all float32: weights, their averages, and Adam's two moments."""
    return 4 * (1 + 1 + len(config.train.ema_decays) + 2)


def sample_bytes(config: "RunConfig") -> int:
    """Bytes of an evaluation's samples as uint8 pixels."""
    return config.evaluate.images * config.images.size**2 * PIXEL_CHANNELS


def latent_shape(config: "RunConfig") -> tuple[int, int]:
    """(channels C, side h) of one image's latents."""
    channels = PIXEL_CHANNELS if config.tokenizer.kind == "pixels" else config.tokenizer.channels
    return channels, config.images.size // config.tokenizer.stride


def model_config(config: "RunConfig", classes: int) -> "MARConfig":
    """The model's whole configuration, with the latent shape of the tokenizer's settings, since there may be no cache yet."""
    from mar_model import MARConfig

    channels, side = latent_shape(config)
    return MARConfig(**dataclasses.asdict(config.model), latent_size=side, latent_channels=channels, classes=classes)


def parameters(config: "RunConfig", classes: int) -> int:
    """The number of the model's parameters."""
    from mar_model.training.footprint import parameter_count

    return parameter_count(model_config(config, classes))
