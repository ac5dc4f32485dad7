"""A checkpoint directory: `model.safetensors`, `ema.safetensors`, `optimizer.safetensors` and `state.json` (no pickles).

`state.json` contains format_version, model (the MARConfig), images_seen, the latents' normalisation, and a digest of each file
to detect damaged or incomplete checkpoints.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mar_model.config import MARConfig
from mar_model.files import describe_misfit, read_json, read_tensors, shapes_of
from mar_model.head.diffusion import Diffusion
from mar_model.mar import MAR

FORMAT_VERSION = 1
WEIGHTS, AVERAGE, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"


def average_file(decay: float) -> str:
    """The file of an additional moving average, e.g. `ema-0.999.safetensors`; the average of `train.ema_decay` is `ema.safetensors`."""
    return f"ema-{decay:g}.safetensors"


def write_checkpoint(directory: Path, config: MARConfig, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write a checkpoint into the folder `directory`: `tensors` (file → name → values, on the CPU) and last `state.json`, which keeps
    `state` beside the model's configuration and digests."""
    for file, values in tensors.items():
        save_file(values, directory / file)
    write_state(directory, config, state)


def write_state(directory: Path, config: MARConfig, state: dict[str, Any]) -> None:
    """Write `state.json` for the weights in `directory`: `state`, the model's configuration and the files' digests."""
    digests = {file.name: file_digest(file) for file in sorted(directory.glob("*.safetensors"))}
    whole = {"format_version": FORMAT_VERSION, "model": asdict(config), **state, "files": digests}
    (directory / STATE).write_text(json.dumps(whole, indent=2) + "\n")


def read_state(directory: Path) -> dict[str, Any]:
    """The verified `state.json`. Raises ValueError with the file that is missing, damaged or of another format."""
    path = directory / STATE
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint: no {STATE} in it")
    state = read_json(path)
    if state.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {state.get('format_version')!r}, expected {FORMAT_VERSION}")
    for name in ("model", "files"):
        if not isinstance(state.get(name), dict):
            raise ValueError(f"{path} is damaged: {name} is {state.get(name)!r}, expected an object")
    try:
        config_of(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: model: {error}") from error
    if WEIGHTS not in state["files"] or AVERAGE not in state["files"]:
        raise ValueError(f"{path} is damaged: files has {', '.join(state['files']) or 'nothing'}, expected {WEIGHTS} and {AVERAGE} too")
    for name, expected in state["files"].items():
        found = file_digest(directory / name) if (directory / name).is_file() else "missing"
        if found != expected:
            raise ValueError(f"{directory / name} is damaged: SHA-256 {found}, expected {expected}")
    return state


def weights_file(state: Mapping[str, Any], ema: bool = True, decay: float = 0.0) -> str:
    """The file with the raw weights, the average of `train.ema_decay` (decay 0), or the average of another `decay`.

    Raises ValueError with the existing averages if there is none of `decay`.
    """
    if not ema:
        return WEIGHTS
    train = state.get("train", {})
    if not decay or decay == train.get("ema_decay"):
        return AVERAGE
    if average_file(decay) not in state["files"]:
        existing = [train.get("ema_decay"), *train.get("ema_decays", [])]
        raise ValueError(f"the checkpoint holds no average of decay {decay:g}, only of {', '.join(map(str, existing))}")
    return average_file(decay)


def load_model(directory: Path, ema: bool = True, decay: float = 0.0) -> tuple[MAR, dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, with averaged (see `weights_file`) or raw weights, and its state.

    Takes the memory of one copy of the weights. Raises ValueError for a damaged checkpoint, a missing average, and weights that do not
    fit the configuration.
    """
    state = read_state(directory)
    model = model_without_weights(config_of(state))
    path = directory / weights_file(state, ema, decay)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    misfit = describe_misfit(shapes_of(model.state_dict()), shapes)
    if misfit:
        raise ValueError(f"{path} does not fit the configuration in {STATE}: {misfit}")
    model.load_state_dict({name: _read_tensor(path, name) for name in shapes}, assign=True)
    return model.eval(), state


def config_of(state: Mapping[str, Any]) -> MARConfig:
    """The model's configuration in a checkpoint's `state.json`; fields of newer versions are ignored."""
    known = {one.name for one in fields(MARConfig)}
    return MARConfig(**{name: value for name, value in state["model"].items() if name in known})


def _read_tensor(path: Path, name: str) -> Tensor:
    """A float32 copy of one tensor. The file is mapped again for each tensor, so pages of earlier tensors do not stay in memory."""
    with safe_open(path, "pt") as file:
        value: Tensor = file.get_tensor(name)
    return value.to(torch.float32, copy=True)


def model_without_weights(config: MARConfig) -> MAR:
    """A model on the meta device, to be filled by `load_state_dict(…, assign=True)`. This avoids the random initialisation, which takes
    a large model seconds and a second copy in memory."""
    with torch.device("meta"):
        model = MAR(config)
    model.diffloss.diffusion = Diffusion()  # its tables are computed, not loaded
    return model


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `weights` strictly. Raises ValueError with missing, unexpected and mis-shaped names, and then changes nothing."""
    misfit = describe_misfit(shapes_of(model.state_dict()), shapes_of(weights))
    if misfit:
        raise ValueError(f"weights don't fit the model: {misfit}")
    model.load_state_dict(weights)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` for each parameter NAME."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}.{name}"] = torch.as_tensor(value).detach()
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`optimizer_state` in host memory, contiguous, for saving."""
    return {name: value.contiguous().cpu() for name, value in optimizer_state(model, optimizer).items()}


def load_optimizer(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    place: Callable[[Tensor, Tensor], Tensor] = lambda value, parameter: value.to(parameter.device),
) -> None:
    """Restore the saved state. `step` goes where torch.optim keeps it: to the parameter's device if its group is fused or capturable,
    otherwise to the CPU. `place(value, parameter)` returns the state in the layout of the parameter (sharded if it is sharded).
    Raises ValueError for a parameter without state, or with a state of another shape."""
    tensors = read_tensors(directory / OPTIMIZER)
    with_parameter = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        state = {}
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            if f"{kind}.{name}" not in tensors:
                raise ValueError(f"{directory / OPTIMIZER} holds no {kind} of parameter {name}")
            value = tensors[f"{kind}.{name}"]
            if kind != "step" and value.shape != parameter.shape:
                raise ValueError(f"{directory / OPTIMIZER}: {kind} of {name} is {list(value.shape)}, expected {list(parameter.shape)}")
            if kind == "step":
                state[kind] = value.to(parameter.device) if with_parameter[id(parameter)] else value
            else:
                state[kind] = place(value, parameter)
        optimizer.state[parameter] = state


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
