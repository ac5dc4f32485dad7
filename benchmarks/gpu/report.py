"""The results file, the final table, and a verdict for each goal."""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Line, line
from benchmarks.gpu.speed import EXACT

TRAINING, MFU, EXACT_GENERATION, FAST_GENERATION = 2.5, 0.45, 3.0, 10.0  # times the release; MFU; times the release


class Report:
    """Writes result lines to the file and the screen as they arrive."""

    def __init__(self, out: Path, append: bool = False) -> None:
        """With `append`, keep the lines of an existing file."""
        self.out, self.lines = out, []
        out.parent.mkdir(parents=True, exist_ok=True)
        if append and out.is_file():
            self.lines: list[Line] = [json.loads(one) for one in out.read_text(encoding="utf-8").splitlines()]
        else:
            out.write_text("", encoding="utf-8")

    def add(self, found: Line) -> None:
        """Write one line immediately. Infinite and NaN values are written as text, because JSON has none."""
        text = json.dumps({name: _plain(value) for name, value in found.items()})
        with self.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(text, flush=True)
        self.lines.append(found)

    def table(self) -> str:
        marks = {True: "ok", False: "FAILED", None: ""}
        rows = [(one["kind"], one["name"], marks[one["passed"]], one["summary"]) for one in self.lines if one["kind"] != "part"]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n" + "\n".join("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]) for row in rows)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def verdicts(lines: Sequence[Line], judged: bool = True) -> list[Line]:
    """One line per goal. `passed` is None if a required measurement is missing, or without `judged` (tiny models)."""
    goal = functools.partial(_goal, judged)
    by_name = {(one["kind"], one["name"]): one for one in lines}

    def best(kind: str, names: Sequence[str], value: str, of: Any) -> Line | None:
        found = [by_name[kind, name] for name in names if value in by_name.get((kind, name), {})]
        return of(found, key=lambda one: one[value]) if found else None

    found = []
    for size in ("large", "base"):
        ours = best("training", [f"{size} compiled", f"{size} eager"], "images_per_second", max)
        release = best("training", [f"{size} release"], "images_per_second", max)
        ratio = ours["images_per_second"] / release["images_per_second"] if ours and release else None
        found.append(goal(f"training {size}, times the release", ratio, TRAINING, "{:.2f}"))
        found.append(goal(f"training {size}, MFU", ours["mfu"] if ours else None, MFU, "{:.1%}"))
    release = best("generation", ["release"], "seconds_an_image", min)
    fast = [name for kind, name in by_name if kind == "generation" and name.endswith("all fast modes")]
    for name, names, times in (("exact", EXACT, EXACT_GENERATION), ("with fast modes", fast, FAST_GENERATION)):
        ours = best("generation", names, "seconds_an_image", min)
        ratio = release["seconds_an_image"] / ours["seconds_an_image"] if ours and release else None
        found.append(goal(f"generation {name}, times the release", ratio, times, "{:.2f}"))
    return found


def _goal(judged: bool, name: str, value: float | None, goal: float, form: str) -> Line:
    if value is None:
        return line("verdict", name, f"not measured; the goal is {form.format(goal)}", value=None, goal=goal)
    reached = value >= goal if judged else None
    return line("verdict", name, f"{form.format(value)}; the goal is {form.format(goal)}", reached, value=value, goal=goal)
