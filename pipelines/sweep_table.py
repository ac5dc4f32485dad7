"""What a sweep leaves for people: a table (JSON, CSV) and a plot of the metric against the parameters."""

import csv
import io
from collections import defaultdict
from typing import Any

from pipelines import storage

LOG_SCALE_RATIO = 30.0  # largest over smallest parameter value from which the axis is logarithmic


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


def draw_plot(path: str, rows: list[dict[str, Any]], metric: str, best: str) -> None:
    """`path/sweep.png`: along the axis the parameter with most values, one line for every combination of the others."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    names = list(rows[0]["parameters"])
    across = max(names, key=lambda name: len({str(row["parameters"][name]) for row in rows}))
    values = list(dict.fromkeys(row["parameters"][across] for row in rows))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {value: value if numeric else index for index, value in enumerate(values)}
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        others = ", ".join(f"{name.split('.')[-1]} {row['parameters'][name]}" for name in names if name != across)
        if row["metric"] is not None:
            lines[others].append((place[row["parameters"][across]], row["metric"]))

    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for others, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=others or None)
    for row in rows:
        if row["trial"] == best:
            point = (place[row["parameters"][across]], row["metric"])
            axes.plot(*point, marker="o", markersize=13, fillstyle="none", color="black", linestyle="none", label="best")
    if not numeric:
        axes.set_xticks(range(len(values)), [str(value) for value in values])
    elif min(values) > 0 and max(values) / min(values) >= LOG_SCALE_RATIO:
        axes.set_xscale("log")
    elif len(values) <= 8:
        axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    axes.set_xlabel(across)
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    storage.write_bytes(storage.join(path, "sweep.png"), image.getvalue())
