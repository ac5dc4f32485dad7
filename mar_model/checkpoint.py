"""A checkpoint directory: `model.safetensors`, `ema.safetensors`, `optimizer.safetensors` and `state.json` (nothing is pickled).

`state.json` holds format_version, model (the MARConfig), images_seen, the latents' normalisation, and a digest of each file,
so that a damaged or half-copied checkpoint is known as such.
"""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mar_model.config import MARConfig
from mar_model.mar import MAR

FORMAT_VERSION = 1
WEIGHTS, AVERAGE, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(
    directory: Path,
    model: MAR,
    average: dict[str, Tensor],
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a checkpoint into `directory`, `state.json` last. `state` is kept beside the model's configuration and digests."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}, directory / WEIGHTS)
    save_file({name: value.contiguous().cpu() for name, value in average.items()}, directory / AVERAGE)
    files = [WEIGHTS, AVERAGE]
    if optimizer is not None:
        save_file(optimizer_tensors(model, optimizer), directory / OPTIMIZER)
        files.append(OPTIMIZER)
    digests = {name: file_digest(directory / name) for name in files}
    whole = {"format_version": FORMAT_VERSION, "model": asdict(model.config), **state, "files": digests}
    (directory / STATE).write_text(json.dumps(whole, indent=2) + "\n")


def read_state(directory: Path) -> dict[str, Any]:
    """The verified `state.json`. Raises ValueError naming the file that is missing, damaged or of another format."""
    path = directory / STATE
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint: no {STATE} in it")
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if state.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {state.get('format_version')!r}, expected {FORMAT_VERSION}")
    for name, expected in state["files"].items():
        found = file_digest(directory / name) if (directory / name).is_file() else "missing"
        if found != expected:
            raise ValueError(f"{directory / name} is damaged: SHA-256 {found}, expected {expected}")
    return state


def load_model(directory: Path, ema: bool = True) -> tuple[MAR, dict[str, Any]]:
    """The model of a checkpoint, in evaluation mode, with the averaged weights or the raw ones; and its state.

    Raises ValueError for a damaged checkpoint and for weights that do not fit the configuration.
    """
    state = read_state(directory)
    known = {one.name for one in fields(MARConfig)}
    model = MAR(MARConfig(**{name: value for name, value in state["model"].items() if name in known}))
    load_weights(model, load_file(directory / (AVERAGE if ema else WEIGHTS)))
    return model.eval(), state


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `weights` exactly. Raises ValueError that lists missing, unexpected and mis-shaped names; nothing is changed then."""
    own = model.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    misshaped = [
        f"{name} {tuple(weights[name].shape)} (expected {tuple(own[name].shape)})"
        for name in sorted(own.keys() & weights.keys())
        if weights[name].shape != own[name].shape
    ]
    if missing or unexpected or misshaped:
        raise ValueError(f"weights don't fit the model; missing: {missing}; unexpected: {unexpected}; mis-shaped: {misshaped}")
    model.load_state_dict(weights)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` for each parameter NAME."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}.{name}"] = torch.as_tensor(value).detach().contiguous().cpu()
    return tensors


def load_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved state back. Raises ValueError naming a parameter without state."""
    tensors = load_file(directory / OPTIMIZER)
    for name, parameter in model.named_parameters():
        state = {}
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            if f"{kind}.{name}" not in tensors:
                raise ValueError(f"{directory / OPTIMIZER} holds no {kind} of parameter {name}")
            value = tensors[f"{kind}.{name}"]
            state[kind] = value if kind == "step" else value.to(parameter.device)
        optimizer.state[parameter] = state


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
