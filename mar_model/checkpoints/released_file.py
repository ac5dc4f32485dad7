"""Reading published PyTorch files: those of the MAR release (LTH14/mar), and Lightning checkpoints such as LDM's.

The files are pickles, so they are read with `weights_only=True`: tensors, numbers, text, and as the only additional class
`argparse.Namespace`, which contains the release's arguments. Lightning's classes, which identify the states of its callbacks, are replaced
with empty classes.
"""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RAW, EMA = "model", "model_ema"  # the release's keys of its two sets of weights
FILE = "checkpoint-last.pth"  # the file that the release loads from its --resume folder
LIGHTNING = "state_dict"  # the key of a Lightning checkpoint's weights
LIGHTNING_MODULES = ("pytorch_lightning.", "lightning.pytorch.", "lightning_fabric.", "lightning.fabric.")
LOSS = "loss."  # prefix of weights of training losses, which a tokenizer does not need


class ReleasedFile:
    """One published file, memory-mapped: `weights` by key, `arguments` by the release's names, `epoch`."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file is not a PyTorch file, is damaged, would run code, or contains no weights."""
        content = _read(path)
        if isinstance(content, dict) and RAW not in content and _of_autoencoder(content.get(LIGHTNING)):
            content = {RAW: {name: value for name, value in content[LIGHTNING].items() if not str(name).startswith(LOSS)}}
        if not isinstance(content, dict) or not isinstance(content.get(RAW, content.get(EMA)), dict):
            found = sorted(str(key) for key in content)[:8] if isinstance(content, dict) else type(content).__name__
            raise ValueError(
                f"{path} holds {found}, expected a dictionary with weights under {RAW!r} or {EMA!r}, or a Lightning checkpoint of an "
                "autoencoder"
            )
        self.path = path
        self.weights = {key: _tensors(path, key, content[key]) for key in (RAW, EMA) if key in content}
        arguments = content.get("args")
        self.arguments: dict[str, Any] = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
        self.epoch: int | None = content["epoch"] if isinstance(content.get("epoch"), int) else None

    @property
    def is_tokenizer(self) -> bool:
        """Whether the parameter names are those of an autoencoder, not of a MAR model."""
        return _of_autoencoder(self.weights.get(RAW))


def _of_autoencoder(weights: Any) -> bool:
    names = weights if isinstance(weights, dict) else ()
    return any(str(name).startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")) for name in names)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is not a file, expected {FILE} or kl16.ckpt of MAR's release, or vq-f16, kl-f16 or kl-f8 of LDM's")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_lightning_classes(path)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or malicious file can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(f"{path} contains {refused[1]}; only tensors, numbers, text and argparse.Namespace are read") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a PyTorch file, or is truncated or damaged: {reason[:200]}") from error


def _lightning_classes(path: Path) -> list[Any]:
    """An empty class for each of Lightning's classes in the file, which stores the state of a callback under its class."""
    if not zipfile.is_zipfile(path):
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(type("Unused", (), {}), name) for name in names if name.startswith(LIGHTNING_MODULES)]


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


def check_finite(file: ReleasedFile, key: str) -> None:
    """Raise ValueError naming the tensors under `key` with values that are not finite."""
    broken = [name for name, value in file.weights[key].items() if not bool(value.isfinite().all())]
    if broken:
        raise ValueError(f"{file.path}: {key!r} has values that are not finite in {len(broken)} tensors: {', '.join(broken[:5])}")


def in_float32(file: ReleasedFile, key: str) -> dict[str, Tensor]:
    """The weights under `key`, nothing copied that is float32 already."""
    return {name: value.detach().float().contiguous() for name, value in file.weights[key].items()}
