"""Import and export of the public release's files (LTH14/mar): `checkpoint-last.pth` of MAR and `kl16.ckpt` of its tokenizer.

The files are pickles, so they are read with `weights_only=True`: tensors, numbers, text, and as the only additional class
`argparse.Namespace`, which contains the release's arguments.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mar_model.checkpoints.checkpoint import AVERAGE, WEIGHTS, config_of, model_without_weights, read_state, write_state
from mar_model.checkpoints.released_sizes import STRIDE, released_config, released_kl_config
from mar_model.config import MARConfig
from mar_model.files import describe_misfit, read_tensors, shapes_of
from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer

RAW, EMA = "model", "model_ema"  # the release's keys of its two sets of weights
FILE = "checkpoint-last.pth"  # the file that the release loads from its --resume folder
LATENT_SCALE = 0.2325  # factor on latents before the published models


class ReleasedFile:
    """One file of the release, memory-mapped: `weights` by key, `arguments` by the release's names, `epoch`."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file is not a PyTorch file, is damaged, would run code, or contains no weights."""
        content = _read(path)
        if not isinstance(content, dict) or not isinstance(content.get(RAW, content.get(EMA)), dict):
            found = sorted(str(key) for key in content)[:8] if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} contains {found}, expected a dictionary with weights under {RAW!r} or {EMA!r}")
        self.path = path
        self.weights = {key: _tensors(path, key, content[key]) for key in (RAW, EMA) if key in content}
        arguments = content.get("args")
        self.arguments: dict[str, Any] = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
        self.epoch: int | None = content["epoch"] if isinstance(content.get("epoch"), int) else None

    @property
    def is_tokenizer(self) -> bool:
        """Whether the parameter names are those of an autoencoder, not of a MAR model."""
        names = self.weights.get(RAW, {})
        return any(name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for name in names)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is not a file, expected a {FILE} or kl16.ckpt of the release")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or malicious file can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(f"{path} contains {refused[1]}; only tensors, numbers, text and argparse.Namespace are read") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a PyTorch file, or is truncated or damaged: {reason[:200]}") from error


def _tensors(path: Path, key: str, value: Any) -> dict[str, Tensor]:
    wrong = [str(name) for name, one in value.items() if not isinstance(one, Tensor)] if isinstance(value, dict) else [key]
    if wrong or not value:
        raise ValueError(f"{path} contains no weights under {key!r} but {', '.join(wrong[:5]) or 'nothing'}, expected named tensors")
    odd = [
        f"{name} is {one.dtype}, {one.layout}, on {one.device}"
        for name, one in value.items()
        if not one.is_floating_point() or one.layout != torch.strided or one.device.type != "cpu"
    ]
    if odd:
        raise ValueError(f"{path}: {key!r} has {'; '.join(odd[:5])}; expected dense floating-point weights with values")
    return {str(name): one for name, one in value.items()}


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
        _check_finite(file, key)
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
        save_file(_in_float32(file, key), directory / name)
        file = ReleasedFile(path)
    write_state(directory, config, {**geometry, **state})
    return config


def import_tokenizer(path: Path, directory: Path) -> KLConfig:
    """Write a released autoencoder as a tokenizer directory. Raises ValueError with the tensors that do not fit or are not finite."""
    file = ReleasedFile(path)
    shapes = shapes_of(file.weights[RAW])
    config = released_kl_config(shapes)
    with torch.device("meta"):
        tokenizer = KLAutoencoder(config)
    misfit = describe_misfit(shapes_of(tokenizer.state_dict()), shapes)
    if misfit:
        raise ValueError(f"{path} is not a KL autoencoder of the sizes that its tensors have: {misfit}")
    _check_finite(file, RAW)
    tokenizer.load_state_dict(_in_float32(file, RAW), assign=True)
    save_tokenizer(tokenizer, directory)
    return config


def _check_finite(file: ReleasedFile, key: str) -> None:
    broken = [name for name, value in file.weights[key].items() if not bool(value.isfinite().all())]
    if broken:
        raise ValueError(f"{file.path}: {key!r} has values that are not finite in {len(broken)} tensors: {', '.join(broken[:5])}")


def _in_float32(file: ReleasedFile, key: str) -> dict[str, Tensor]:
    """The weights under `key`; float32 tensors are not copied."""
    return {name: value.detach().float().contiguous() for name, value in file.weights[key].items()}


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
