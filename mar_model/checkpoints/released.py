"""MAR checkpoints of the public release (LTH14/mar), `checkpoint-last.pth`, in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mar_model.checkpoints.checkpoint import AVERAGE, WEIGHTS, config_of, model_without_weights, read_state, write_state
from mar_model.checkpoints.released_file import EMA, RAW, ReleasedFile, check_finite, in_float32
from mar_model.checkpoints.released_sizes import STRIDE, released_config
from mar_model.config import MARConfig
from mar_model.files import describe_misfit, read_tensors, shapes_of

LATENT_SCALE = 0.2325  # factor on latents before the published models


def checked_config(file: ReleasedFile, ema: bool = True, **chosen: int | None) -> MARConfig:
    """The configuration of a released MAR checkpoint, which all its names and shapes fit.

    Raises ValueError with the missing, unexpected and mis-shaped tensors, or with the set of weights that does not exist.
    """
    key = EMA if ema else RAW
    if key not in file.weights:
        other, option = (RAW, "raw") if ema else (EMA, "ema")
        raise ValueError(f"{file.path} has no {key!r}, only {other!r}: use --{option}")
    config = released_config(shapes_of(file.weights[key]), file.arguments, **chosen)
    expected = shapes_of(model_without_weights(config).state_dict())
    for name in sorted(file.weights, key=lambda one: one != key):  # first the weights that determine the sizes
        misfit = describe_misfit(expected, shapes_of(file.weights[name]))
        if misfit:
            raise ValueError(f"{file.path}: {name!r} is not a MAR model of the sizes that its tensors have: {misfit}")
    return config


def import_checkpoint(
    path: Path, directory: Path, state: Mapping[str, Any], *, ema: bool = True, latent_scale: float = LATENT_SCALE, **chosen: int | None
) -> MARConfig:
    """Write a released MAR checkpoint as a checkpoint directory, in the memory of one copy of the weights.

    With `ema` the averaged weights go to `ema.safetensors` and the raw ones to `model.safetensors` (or the average, if the file has no raw
    weights). Without it the raw weights go to both. `chosen`: sizes that the shapes do not determine, as in `released_config`. `state` is
    added to `state.json`. Raises ValueError as `checked_config` does, and for non-finite weights, before anything is written.
    """
    file = ReleasedFile(path)
    config = checked_config(file, ema, **chosen)
    raw = RAW if RAW in file.weights else EMA
    parts = {WEIGHTS: raw, AVERAGE: EMA if ema else RAW}
    for key in set(parts.values()):
        check_finite(file, key)
        file = ReleasedFile(path)  # a new memory map, which releases the pages that were just read
    stride = chosen.get("stride") or int(file.arguments.get("vae_stride") or STRIDE)
    geometry = {
        "images_seen": None,  # the release counts epochs
        "epochs": None if file.epoch is None else file.epoch + 1,
        "image_size": config.latent_size * stride,
        "latent_mean": [0.0] * config.latent_channels,
        "latent_std": [1 / latent_scale] * config.latent_channels,
        "latent_min": None,  # the range of the data is not in the file
        "latent_max": None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, key in parts.items():
        save_file(in_float32(file, key), directory / name)
        file = ReleasedFile(path)
    write_state(directory, config, {**geometry, **state})
    return config


def export_checkpoint(directory: Path, target: Path) -> None:
    """Write the raw and averaged float32 weights of a checkpoint directory to a file that the release can resume from.

    The file has no `args`, because PyTorch refuses to load a Namespace by default since 2.6. It does not contain the normalisation of
    latents: the release's code multiplies them by LATENT_SCALE (see `is_scaled_as_released`). Raises ValueError for a damaged
    checkpoint.
    """
    state = read_state(directory)
    expected = shapes_of(model_without_weights(config_of(state)).state_dict())
    weights = {}
    for key, name in ((RAW, WEIGHTS), (EMA, AVERAGE)):
        weights[key] = read_tensors(directory / name)
        misfit = describe_misfit(expected, shapes_of(weights[key]))
        if misfit:
            raise ValueError(f"{directory / name} does not fit the configuration: {misfit}")
    torch.save(weights, target)


def is_scaled_as_released(state: Mapping[str, Any]) -> bool:
    """Whether the normalisation in `state.json` is the release's: latents times LATENT_SCALE, without a shift."""
    scaled = all(abs(std * LATENT_SCALE - 1) < 1e-6 for std in state["latent_std"])
    return scaled and all(abs(mean) < 1e-6 for mean in state["latent_mean"])
