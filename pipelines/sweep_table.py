"""What a sweep leaves for people: a table, as JSON and CSV."""

import csv
import io
from dataclasses import dataclass
from typing import Any

from pipelines import storage


@dataclass(frozen=True)
class Row:
    """A trial, as `trial.json`, the table and the sweep's summary hold it."""

    trial: str
    parameters: dict[str, Any]
    metric: float | None
    metrics: dict[str, float]
    seconds: float
    error: str | None


def write_table(path: str, rows: list[dict[str, Any]]) -> None:
    """`path/table.json` and `path/table.csv` from rows {trial, parameters, metric, metrics, seconds, error}."""
    storage.write_json(storage.join(path, "table.json"), rows)
    parameters = list(dict.fromkeys(name for row in rows for name in row["parameters"]))
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *parameters, *metrics, "seconds", "error"])
    for row in rows:
        numbers = [row["metrics"].get(name, "") for name in metrics]
        writer.writerow([row["trial"], *(row["parameters"][name] for name in parameters), *numbers, row["seconds"], row["error"] or ""])
    storage.write_bytes(storage.join(path, "table.csv"), text.getvalue().encode())
