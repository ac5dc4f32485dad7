"""Plots as PNG bytes: training curves, and a sweep's metric against its parameters."""

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

LOG_SCALE_RATIO = 30.0  # the axis is logarithmic if the ratio of the largest to the smallest parameter value is at least this
INK, GRID = "#1f2328", "#d8dde3"
BAND_COLOURS = ("#1b3a6b", "#2f74b5", "#58a9c9", "#9fd0c0")  # dark: low noise level, light: high noise level
PANELS = (
    ("images_per_second", "images/s"),
    ("gradient_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("data_wait_share", "waiting for data"),
)


def training_curves(rows: list[dict[str, Any]]) -> bytes:
    """Loss against images seen, and the noise-prediction error in each band of noise levels, from rows of `metrics.jsonl`."""
    figure, axes = _figure(7.2, 3.8)
    for band, colour in enumerate(BAND_COLOURS):
        points = [(row["images_seen"], row[f"loss_band_{band}"]) for row in rows if row.get(f"loss_band_{band}") is not None]
        if points:
            # 4 bands of 250 of the 1000 timesteps each
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=f"steps {250 * band}–{250 * band + 249}")
    axes.plot([row["images_seen"] for row in rows], [row["loss"] for row in rows], color=INK, linewidth=2.0, label="loss")
    axes.set_ylabel("loss", color=INK, fontsize=9)
    _count_images(axes)
    return _finished(figure, axes)


def training_panels(rows: list[dict[str, Any]]) -> bytes:
    """Four small plots: throughput, gradient norm, learning rate, and the share of time spent waiting for data."""
    figure = Figure(figsize=(7.2, 3.8), dpi=120, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _style(axes)
        _count_images(axes)
        points = [(row["images_seen"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=BAND_COLOURS[1], linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9, color=INK)
    return _png(figure)


def loss_curve(points: list[tuple[float, float]]) -> bytes:
    """A single loss against images seen."""
    figure, axes = _figure(7.2, 2.8)
    axes.plot(*zip(*points, strict=True), color=BAND_COLOURS[1], linewidth=1.8, label="loss")
    if min(loss for _, loss in points) > 0:
        axes.set_yscale("log")
    _count_images(axes)
    return _finished(figure, axes)


def sweep_plot(rows: list[dict[str, Any]], metric: str, best: str) -> bytes:
    """Rows of a sweep's table. The x-axis is the parameter with the most values; each combination of the others is a line."""
    names = list(rows[0]["parameters"])
    across = max(names, key=lambda name: len({str(row["parameters"][name]) for row in rows}))
    values = list({str(row["parameters"][across]): row["parameters"][across] for row in rows}.values())
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {str(value): float(value) if numeric else float(index) for index, value in enumerate(values)}
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        others = ", ".join(literal(f"{name.split('.')[-1]} {row['parameters'][name]}") for name in names if name != across)
        if row["metric"] is not None:
            lines[others].append((place[str(row["parameters"][across])], row["metric"]))

    figure, axes = _figure(7.2, 3.2)
    for others, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", linewidth=1.8, label=others or None)
    for row in rows:
        if row["trial"] == best:
            point = (place[str(row["parameters"][across])], row["metric"])
            axes.plot(*point, marker="o", markersize=13, fillstyle="none", color=INK, linestyle="none", label="best")
    if not numeric:
        axes.set_xticks(range(len(values)), [literal(str(value)) for value in values])
    elif min(values) > 0 and max(values) / min(values) >= LOG_SCALE_RATIO:
        axes.set_xscale("log")
    elif len(values) <= 8:
        axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    axes.set_ylabel(literal(metric.replace("_", " ").replace("frechet", "Fréchet")), color=INK, fontsize=9)
    return _finished(figure, axes, across)


def metric_curves(curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> dict[str, bytes]:
    """One small plot for each metric: points (images seen, value, standard error), with error bars of one standard error where it is
    known. Returns the figure as `png` and `svg`."""
    rows = -(-len(curves) // 2)
    figure = Figure(figsize=(7.2, 1.9 * rows + 0.3), dpi=120, layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for axes, (name, points) in zip(panels, curves.items(), strict=False):
        _style(axes)
        _count_images(axes)
        seen, values, errors = zip(*points, strict=True)
        axes.errorbar(
            seen, values, yerr=[error if math.isfinite(error) else 0.0 for error in errors],
            color=BAND_COLOURS[1], linewidth=1.6, marker="o", markersize=3.5, capsize=3, ecolor=INK, elinewidth=0.9,
        )  # fmt: skip
        axes.set_title(literal(name.replace("_", " ").replace("frechet", "Fréchet")), fontsize=9, color=INK)
    for axes in list(figure.axes)[len(curves) :]:
        axes.set_visible(False)
    with rc_context({"svg.hashsalt": "mar"}):  # equal figures give equal files
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {"png": _png(figure), "svg": svg.getvalue()}


def literal(text: str) -> str:
    """Escape dollar signs, between which matplotlib typesets a formula."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=8, length=0)


def _count_images(axes: Any) -> None:
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e3 else f"{x:g}")


def _finished(figure: Figure, axes: Any, across: str = "images seen") -> bytes:
    axes.set_xlabel(across, color=INK, fontsize=9)
    count = len(axes.get_legend_handles_labels()[0])
    if count > 1 or across != "images seen":
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(count, 5), frameon=False, fontsize=8, labelcolor=INK)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
