"""A tokenizer on disk: a directory with `config.json` (`kind`, sizes, `format_version`) and, unless it has no weights,
`tokenizer.safetensors`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mar_model.files import describe_misfit, read_json, read_tensors, shapes_of
from mar_model.tokenizers.kl import KLAutoencoder, KLConfig
from mar_model.tokenizers.pixels import PixelTokenizer
from mar_model.tokenizers.vq import VQAutoencoder, VQConfig

Tokenizer = KLAutoencoder | VQAutoencoder | PixelTokenizer
FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "tokenizer.safetensors"
KINDS: dict[str, tuple[type[KLConfig | VQConfig], type[KLAutoencoder | VQAutoencoder]]] = {
    "kl": (KLConfig, KLAutoencoder),
    "vq": (VQConfig, VQAutoencoder),
}
ADDED = {"level_attention": "encoder"}  # sizes that earlier versions did not write: left out at this value, so that digests stay


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `config.json` and, of a tokenizer with weights, `tokenizer.safetensors` into `directory`, which is created if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"kind": "pixels"}
    if not isinstance(tokenizer, PixelTokenizer):
        sizes = asdict(tokenizer.config)
        kind = "vq" if isinstance(tokenizer, VQAutoencoder) else "kl"
        config = {"kind": kind} | {name: value for name, value in sizes.items() if name not in ADDED or value != ADDED[name]}
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
        save_file(weights, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({**config, "format_version": FORMAT_VERSION}, indent=2) + "\n", encoding="utf-8")


def network_config(content: Mapping[str, Any]) -> KLConfig | VQConfig | None:
    """The sizes of the autoencoder whose `config.json` has this content; None for pixels, which need no network.

    Raises ValueError for an unknown kind, format version or key. Its message continues a sentence that begins with the file's name.
    """
    sizes = {name: value for name, value in content.items() if name not in ("format_version", "kind")}
    version, kind = content.get("format_version"), content.get("kind")
    if version != FORMAT_VERSION:
        raise ValueError(f"has format_version {version!r}, expected {FORMAT_VERSION}")
    if kind == "pixels":
        return None
    if kind not in KINDS:
        raise ValueError(f"has kind {kind!r}, expected 'kl', 'vq' or 'pixels'")
    config = KINDS[kind][0]
    unknown = sorted(set(sizes) - {one.name for one in fields(config)})
    if unknown:
        raise ValueError(f"has unknown keys {unknown}")
    try:
        return config(**sizes)
    except TypeError as error:  # a size that is not a number
        raise ValueError(f"has sizes {sizes}, expected whole numbers: {error}") from error


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, on the CPU, in evaluation mode.

    Raises FileNotFoundError where a file is missing, ValueError on a damaged file, on an unknown kind, format version or configuration
    key, and on weights that do not fit the configuration (naming the first missing, unexpected and mis-shaped tensors).
    """
    file = directory / CONFIG
    content = read_json(file)
    try:
        config = network_config(content)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error
    if config is None:
        return PixelTokenizer().eval()
    tokenizer = without_weights(config)
    weights = read_tensors(directory / WEIGHTS)
    misfit = describe_misfit(shapes_of(tokenizer.state_dict()), shapes_of(weights))
    if misfit:
        raise ValueError(f"{directory / WEIGHTS} does not fit its {CONFIG}: {misfit}")
    tokenizer.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in weights.items()}, assign=True)
    return tokenizer.eval()


def make_tokenizer(config: KLConfig | VQConfig) -> KLAutoencoder | VQAutoencoder:
    """An autoencoder of these sizes, with initial weights from the default generator."""
    return VQAutoencoder(config) if isinstance(config, VQConfig) else KLAutoencoder(config)


def without_weights(config: KLConfig | VQConfig) -> KLAutoencoder | VQAutoencoder:
    """The same on the meta device: names and shapes alone."""
    with torch.device("meta"):
        return make_tokenizer(config)
