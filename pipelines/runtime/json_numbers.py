"""Measured numbers in JSON files. JSON has no NaN: a number that is not finite, such as a mean over nothing, is written as null, which
strict readers take (`jq`, JavaScript) and pandas and Polars read as a missing value; what we read back is NaN again."""

import math
from collections.abc import Mapping
from typing import Any


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
