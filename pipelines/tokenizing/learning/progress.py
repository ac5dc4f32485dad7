"""`progress.safetensors`: the state of a training run under way, in one file so that it is written atomically."""

import json
from collections.abc import Mapping
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipelines.runtime import storage
from pipelines.runtime.records import damaged

PROGRESS = "progress.safetensors"
KINDS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
AGAIN = "delete it, and the tokenizer is trained from the start"


class Progress(NamedTuple):
    """What `save_progress` wrote. `curve`: [images seen, loss]; `validations`: [images seen, PSNR in dB]."""

    tensors: dict[str, Tensor]
    images_seen: int
    curve: list[list[float]]
    validations: list[list[float]]


def save_progress(
    path: str, tensors: Mapping[str, Tensor], images_seen: int, curve: list[list[float]], validations: list[list[float]]
) -> None:
    """Write `progress.safetensors` into the tokenizer directory `path`."""
    metadata = {"images_seen": str(images_seen), "loss_curve": json.dumps(curve), "validations": json.dumps(validations)}
    storage.write_bytes(storage.join(path, PROGRESS), safetensors.torch.save(dict(tensors), metadata))


def read_progress(path: str) -> Progress | None:
    """The progress in the tokenizer directory `path`, None where there is none. Raises DamagedFileError."""
    file = storage.join(path, PROGRESS)
    if not storage.exists(file):
        return None
    data = storage.read_bytes(file)
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # 8 bytes of its length, then JSON
        metadata = header["__metadata__"]
        validations = json.loads(metadata.get("validations", "[]"))  # an earlier version did not write them
        return Progress(tensors, int(metadata["images_seen"]), json.loads(metadata["loss_curve"]), validations)
    except (safetensors.SafetensorError, ValueError, LookupError) as error:
        raise damaged(file, error, AGAIN) from error


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, their names with a prefix."""
    return {f"{prefix}{name}": value.detach().contiguous().cpu() for name, value in tensors.items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def put_state(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put `optimizer_tensors` of `module` back, in the memory layout of each parameter. A parameter that had no state has none again.
    Raises LookupError where a part of a state is missing."""
    for name, parameter in module.named_parameters():
        if f"step.{name}" not in tensors:
            continue
        step, *moments = (tensors[f"{kind}.{name}"] for kind in KINDS)
        state = {"step": step.to(parameter.device, copy=True)}
        for kind, value in zip(KINDS[1:], moments, strict=True):
            state[kind] = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter] = state
