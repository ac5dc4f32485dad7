"""JSON files that a stage writes and reads: their types are checked, and damage is an error that names the file."""

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.runtime.errors import DamagedFileError

REMEDY = "restore it from a copy, or delete it and run the command that wrote it again"
LONGEST_VALUE = 40  # characters of a wrong value that a message shows


def damaged(path: str, found: object, remedy: str = REMEDY) -> DamagedFileError:
    """The error for a damaged file; `found` describes the damage."""
    text = f"{path} is damaged: {' '.join(str(found).split()) or 'it cannot be read'}"
    return DamagedFileError(text, remedy)


def parsed(data: bytes, path: str, shape: Any = Any, remedy: str = REMEDY) -> Any:
    """The JSON value in `data`, which was read from `path`.

    `shape` is its type. For a JSON object it is a dataclass with a field for each key that is read; a field with a default may be missing.
    Additional keys are returned too. Raises DamagedFileError if the data is not JSON or a value has the wrong type.
    """
    try:
        _adapter(shape).validate_json(data, strict=True)
        return json.loads(data)
    except ValidationError as error:
        raise damaged(path, _first(error) if data else "the file is empty", remedy) from error
    except ValueError as error:
        raise damaged(path, error, remedy) from error


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _first(error: ValidationError) -> str:
    """The first error as text."""
    first = error.errors(include_url=False)[0]
    key, message = ".".join(map(str, first["loc"])), first["msg"]
    if first["type"] == "json_invalid":
        return message
    if first["type"] == "missing":
        return f"{key} is missing"
    value = repr(first["input"])
    value = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}…"
    return f"{key + ' is' if key else 'it holds'} {value}: {message[0].lower()}{message[1:]}"


def null_for_nan(value: Any) -> Any:
    """`value` with every non-finite float replaced by None, also inside mappings, lists and tuples."""
    if isinstance(value, Mapping):
        return {name: null_for_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nan_for_null(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics with every null replaced by NaN."""
    return {name: math.nan if value is None else value for name, value in row.items()}
