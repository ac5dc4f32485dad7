"""What a sweep leaves for people: a table, as JSON and CSV."""

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

from pipelines.runtime import storage
from pipelines.runtime.records import nan_for_null, null_for_nan
from pipelines.sweeping.trials import Trial


def row_of(trial: Trial, outcome: dict[str, Any], metric: str) -> dict[str, Any]:
    """A line of the table: {trial, parameters, metric, metrics, seconds, caution, error}, with NaN for a number that is not finite.

    `outcome`: what the trial returned. It failed where it raised an error, and where its `metric` is missing or not finite.
    """
    figures = nan_for_null({name: value for name, value in outcome["metrics"].items() if name not in ("format_version", "seconds")})
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    value, error = numbers.get(metric), outcome["error"]
    if error is None and (value is None or not math.isfinite(value)):
        found = f"not among its metrics: {', '.join(numbers)}" if value is None else value
        error = f"sweep.metric {metric} is {found}"
    return {
        "trial": trial.name,
        "parameters": trial.parameters,
        "metric": value if error is None else None,
        "metrics": numbers,
        "seconds": outcome["seconds"],
        "caution": outcome["metrics"].get("caution", ""),
        "error": error,
    }


@dataclass(frozen=True)
class Row:
    """A trial, as `trial.json`, the table and the sweep's summary hold it."""

    trial: str
    parameters: dict[str, Any]
    metric: float | None
    metrics: dict[str, float | None]  # null: not finite
    seconds: float
    error: str | None


def write_table(path: str, rows: list[dict[str, Any]]) -> None:
    """`path/table.json` and `path/table.csv` from the lines of the table. A metric that is not finite is null in the first and `nan` in
    the second; one that a trial does not have is empty there."""
    storage.write_json(storage.join(path, "table.json"), null_for_nan(rows))
    parameters = list(dict.fromkeys(name for row in rows for name in row["parameters"]))
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *parameters, *metrics, "seconds", "caution", "error"])
    for row in rows:
        numbers = [nan_for_null(row["metrics"]).get(name, "") for name in metrics]
        ending = [row["seconds"], row.get("caution", ""), row["error"] or ""]
        writer.writerow([row["trial"], *(row["parameters"][name] for name in parameters), *numbers, *ending])
    storage.write_bytes(storage.join(path, "table.csv"), text.getvalue().encode())
