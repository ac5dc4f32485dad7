"""The metrics of an evaluation as a table of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

ERROR = "_standard_error"  # ends the name of a metric's standard error


def metrics(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows {name, value, error, extrapolated} of the last evaluation, by the summaries; none of an earlier version, which has no errors."""
    known = evaluations[-1] if evaluations else {}
    named = [name for name in known if f"{name}{ERROR}" in known or f"{name.replace('_std', '_mean')}{ERROR}" in known]
    return [
        {"name": name, "value": known[name], "error": known.get(f"{name}{ERROR}"), "extrapolated": known.get(f"{name}_extrapolated")}
        for name in named
    ]
