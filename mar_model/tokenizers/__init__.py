"""Tokenizers: images ↔ latents, behind one interface.

A tokenizer is an `nn.Module` with `channels` (latent channels), `stride` (pixels per latent side), `encode(images)` →
moments and `decode(latents)` → images. On disk it is a directory: `config.json` (`kind`, its sizes, `format_version`) and,
where it has weights, `tokenizer.safetensors`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mar_model.files import describe_misfit, read_json, read_tensors, shapes_of
from mar_model.tokenizers.kl import KLAutoencoder, KLConfig, posterior_kl, sample_posterior
from mar_model.tokenizers.pixels import PixelTokenizer

__all__ = [
    "KLAutoencoder", "KLConfig", "PixelTokenizer", "Tokenizer", "kl_config", "load_tokenizer", "posterior_kl", "sample_posterior",
    "save_tokenizer",
]  # fmt: skip

Tokenizer = KLAutoencoder | PixelTokenizer
FORMAT_VERSION = 1


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `config.json` and, of a tokenizer with weights, `tokenizer.safetensors` into `directory` (made if need be)."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"kind": "pixels"}
    if isinstance(tokenizer, KLAutoencoder):
        config = {"kind": "kl", **asdict(tokenizer.config)}
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
        save_file(weights, directory / "tokenizer.safetensors")
    (directory / "config.json").write_text(json.dumps({**config, "format_version": FORMAT_VERSION}, indent=2) + "\n", encoding="utf-8")


def kl_config(content: Mapping[str, Any]) -> KLConfig | None:
    """The sizes of the autoencoder whose `config.json` has this content; None for pixels, which need no network.

    Raises ValueError for an unknown kind, format version or key, as the end of a sentence that begins with the file.
    """
    sizes = {name: value for name, value in content.items() if name not in ("format_version", "kind")}
    version, kind = content.get("format_version"), content.get("kind")
    if version != FORMAT_VERSION:
        raise ValueError(f"has format_version {version!r}, expected {FORMAT_VERSION}")
    if kind == "pixels":
        return None
    if kind != "kl":
        raise ValueError(f"has kind {kind!r}, expected 'kl' or 'pixels'")
    unknown = sorted(set(sizes) - {one.name for one in fields(KLConfig)})
    if unknown:
        raise ValueError(f"has unknown keys {unknown}")
    try:
        return KLConfig(**sizes)
    except TypeError as error:  # a size that is no number
        raise ValueError(f"has sizes {sizes}, expected whole numbers: {error}") from error


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, on the CPU, in evaluation mode.

    Raises FileNotFoundError where a file is missing, ValueError on a damaged file, on an unknown kind, format version or configuration
    key, and on weights that do not fit the configuration (naming the first missing, unexpected and mis-shaped tensors).
    """
    file = directory / "config.json"
    content = read_json(file)
    try:
        config = kl_config(content)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error
    if config is None:
        return PixelTokenizer().eval()
    with torch.device("meta"):
        tokenizer = KLAutoencoder(config)
    weights = read_tensors(directory / "tokenizer.safetensors")
    misfit = describe_misfit(shapes_of(tokenizer.state_dict()), shapes_of(weights))
    if misfit:
        raise ValueError(f"{directory / 'tokenizer.safetensors'} does not fit its config.json: {misfit}")
    tokenizer.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in weights.items()}, assign=True)
    return tokenizer.eval()
