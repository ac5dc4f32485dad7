"""The command `mar compare`."""

import csv
import io
from json import dumps
from typing import Annotated, Any

import typer

from pipelines.runtime.errors import UserError

Runs = Annotated[list[str], typer.Argument(metavar="RUN…", help="directories of runs or of evaluations")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Csv = Annotated[bool, typer.Option("--csv", help="print CSV, one row for each evaluation")]


def compare_command(runs: Runs, json: Json = False, csv: Csv = False) -> None:
    """Print the metrics of finished evaluations side by side."""
    if json and csv:
        raise UserError("both --json and --csv are given", remedy="give one of the two")
    for run in runs:
        if not run.strip():
            raise UserError("RUN is empty, expected a directory", remedy="give the directory of a run or of an evaluation")
    from jobs.stages import guarded

    def work() -> dict[str, Any]:
        from pipelines.evaluation.compared.records import read_evaluations
        from pipelines.evaluation.compared.table import compared

        return compared(read_evaluations(runs))

    found = guarded("compare", ".", work)
    print(_as_json(found) if json else _as_csv(found) if csv else _as_text(found))


def _as_json(found: dict[str, Any]) -> str:
    from pipelines.runtime.records import null_for_nan

    return dumps(null_for_nan(found), indent=2, ensure_ascii=False)


def _as_csv(found: dict[str, Any]) -> str:
    from pipelines.evaluation.compared.table import flat_rows

    rows = flat_rows(found)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _as_text(found: dict[str, Any]) -> str:
    from pipelines.evaluation.compared.table import text_table

    reference, network = found["reference"], found["network"]
    images = "" if reference.get("images") is None else f" ({reference['images']:,} images)"
    about = f"{found['images']:,} samples, features of {network['name']}, reference: {reference['kind']}{images}; ± standard error"
    sources = [f"published: {source}" for source in dict.fromkeys(row["source"] for row in found["published"])]
    return "\n".join([about, "", text_table(found), *[""] * bool(sources or found["notes"]), *sources, *found["notes"]])
