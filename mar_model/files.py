"""Reading the files of checkpoints and tokenizers. A damaged file raises a ValueError with its path and the damage."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]  # tensor name → shape


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises FileNotFoundError, and ValueError if the file contains anything else."""
    data = path.read_bytes()
    try:
        value = json.loads(data.decode("utf-8"))
    except ValueError as error:  # includes invalid UTF-8
        raise ValueError(f"{path} is damaged: {error if data else 'the file is empty'}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it contains {str(value)[:40]}, expected a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises FileNotFoundError, and ValueError if the file is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def describe_misfit(expected: Shapes, found: Shapes, shown: int = 5) -> str:
    """The missing, unexpected and mis-shaped tensors, with counts and the first `shown` names of each; empty if there are none."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "mis-shaped": [
            f"{name} is {list(found[name])}, expected {list(expected[name])}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    return "; ".join(
        f"{what} ({len(names)}): {', '.join(names[:shown])}{', …' if len(names) > shown else ''}"
        for what, names in problems.items()
        if names
    )
