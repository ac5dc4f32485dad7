"""Files that a stage writes and reads again: JSON of a known shape, and damage as an error that names the file."""

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.runtime.errors import DamagedFileError

REMEDY = "restore it from a copy, or delete it and run the command that wrote it again"
LONGEST_VALUE = 40  # characters shown of a value of the wrong type


def damaged(path: str, found: object, remedy: str = REMEDY) -> DamagedFileError:
    """The error for a file of which `found` is wrong."""
    text = f"{path} is damaged: {' '.join(str(found).split()) or 'it cannot be read'}"
    return DamagedFileError(text, remedy)


def parsed(data: bytes, path: str, shape: Any = Any, remedy: str = REMEDY) -> Any:
    """The JSON value in `data`, which was read from `path`.

    `shape` is a type: of an object a dataclass with a field for each key that is needed and a default for each that may be missing.
    Further keys are returned too. Raises DamagedFileError where the data is no JSON or a value has another type.
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
    """What is wrong first."""
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
    """`value` with None in the place of every float that is not finite, also inside mappings, lists and tuples."""
    if isinstance(value, Mapping):
        return {name: null_for_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nan_for_null(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics as it was measured: NaN where the file says null."""
    return {name: math.nan if value is None else value for name, value in row.items()}
