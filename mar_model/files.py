"""Reading the files of checkpoints and tokenizers: what is wrong with a damaged one is a ValueError that names it."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises FileNotFoundError, and ValueError where the file holds anything else."""
    data = path.read_bytes()
    try:
        value = json.loads(data.decode("utf-8"))
    except ValueError as error:  # also what is no UTF-8
        raise ValueError(f"{path} is damaged: {error if data else 'the file is empty'}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds {str(value)[:40]}, expected a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises FileNotFoundError, and ValueError where the file is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
