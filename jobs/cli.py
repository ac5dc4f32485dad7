"""The command `mar`: one subcommand per stage, plus quickstart, report, submit, doctor, plan, import, export, inspect and verify."""

import signal
import sys
from collections.abc import Callable
from functools import partial
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cache_commands import Check, inspect_command, verify_command
from jobs.command_options import ConfigOptions, PlanOptions, expanded, load
from jobs.evaluation_commands import RecordOut, SamplesGiven, evaluate_assignments, export, reference_command
from jobs.leaving import last_line, say
from jobs.path_options import Command, path_given
from jobs.released import import_command
from jobs.shortcuts import Film, Image, Label, Mask, Out, as_assignments
from jobs.stage_commands import STAGES
from jobs.stages import StageFailed, guarded, run_directory, run_stage, value_at
from pipelines.runtime.cluster.interruption import Terminated, raised
from pipelines.runtime.errors import UserError

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig


class _Interrupted(BaseException):
    """Ctrl-C. A separate type, because click exits silently on KeyboardInterrupt."""


class _Commands(typer.core.TyperGroup):
    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise _Interrupted from None


app = typer.Typer(
    name="mar",
    cls=_Commands,
    help="Masked autoregressive image models (MAR) on Ray.",
    epilog="Example:  mar quickstart",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 96},
)
command = partial(app.command, cls=Command)


def _show_version(asked: bool) -> None:
    if asked:
        from mar_model.version import __version__

        print(f"mar {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")] = False,
) -> None:
    """Masked autoregressive image models (MAR) on Ray."""


def main() -> None:
    """Console script. Exit status: 0, 2 for a user error, 1 for a failure, 130 after Ctrl-C, 143 after SIGTERM."""
    try:
        with raised():
            guarded("mar", "runs", lambda: typer.main.get_command(app)(prog_name="mar"))
    except UserError as error:
        _leave("\n".join(f"mar: error: {line}" for line in str(error).splitlines()), 2)
    except StageFailed as error:
        _leave(f"mar: {error}", 1)
    except (_Interrupted, KeyboardInterrupt):
        _leave("\n" + last_line(signal.SIGINT), 130)
    except Terminated:
        _leave(last_line(signal.SIGTERM), 143)


def _leave(text: str, status: int) -> None:
    print(text, file=sys.stderr)
    sys.exit(status)


def _run(name: str, loaded: "RunConfig", **options: bool) -> None:
    stage = STAGES[name]
    for key in (*stage.reads, stage.writes):
        say(f"  {'writes' if key == stage.writes else 'reads':6} {key:15} {value_at(loaded, key) or '(not set)'}")
    _print_summary(name, run_stage(name, loaded, **options))


def _stage_command(name: str) -> Callable[..., None]:
    def run(given: ConfigOptions) -> None:
        _run(name, given.load())

    def run_generate(
        label: Label = None, image: Image = "", mask: Mask = "", film: Film = False, out: Out = "", *, given: ConfigOptions
    ) -> None:
        _run(name, given.load(as_assignments({"label": label, "image": image, "mask": mask, "film": film, "out": out})))

    def run_cache(check: Check = False, *, given: ConfigOptions) -> None:
        _run(name, given.load(), check=check)

    def run_evaluate(samples: SamplesGiven = "", out: RecordOut = "", *, given: ConfigOptions) -> None:
        _run(name, given.load(evaluate_assignments(samples, out)))

    own: dict[str, Callable[..., None]] = {"cache": run_cache, "generate": run_generate, "evaluate": run_evaluate}
    return own.get(name, run)


for _name, _stage in STAGES.items():
    command(_name, help=_stage.help, epilog=f"Example:  {_stage.example}")(expanded(_stage_command(_name)))


@command(epilog="Example:  mar report runs/demo")
@expanded
def report(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", callback=path_given, help="directory of the run; default: the parent of train.path")
    ] = "",
    *,
    given: ConfigOptions,
) -> None:
    """Write RUN/report.html, one page with all results."""
    if run and given.given():
        raise UserError(f"report {run!r} uses no configuration, but {given.given()[0]} is given", remedy="give one of the two")
    run = run or run_directory(given.load())

    def work() -> str:
        from jobs.report.page import report as write_report

        return write_report(run)

    print(guarded("report", run, work))


@command(epilog="Example:  mar quickstart --set train.workers=1")
@expanded
def quickstart(given: ConfigOptions = ConfigOptions(preset="demo")) -> None:  # noqa: B008  # read, not changed
    """Run all stages, by default of the preset demo."""
    loaded = given.load()

    def work() -> dict[str, Any]:
        from jobs.config.load import load
        from jobs.quickstart.stage import quickstart as run_all

        return run_all(loaded, digits=loaded.images.source == load("demo").images.source)

    _print_summary("quickstart", guarded("quickstart", run_directory(loaded.located()), work))
    _print_next_steps(run_directory(loaded), loaded.tracking.uri)


@command(
    epilog="Example:  mar submit --address http://127.0.0.1:8265 -- doctor --preset demo",
    context_settings={"allow_interspersed_args": False},
)
@expanded
def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND…", help="e.g. train --preset mar_base")],
    address: Annotated[
        str, typer.Option(metavar="URL", callback=path_given, help="the head node's dashboard; or RAY_API_SERVER_ADDRESS")
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="print the job's id and exit; the job continues")] = False,
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="environment variable of the job; repeatable")] = None,
    *,
    given: ConfigOptions,
) -> None:
    """Run a command on a Ray cluster and follow its log."""
    from jobs.submit import environment, job_command, outputs_lost_with_the_job, refuse_password, send

    job = job_command(typer.main.get_command(app), command, given.config, given.preset, given.assignments or [])
    if job.configured:
        loaded = load(job.config, job.preset, job.assignments, given.print_config)
        refuse_password(loaded)
        for warning in outputs_lost_with_the_job(job, loaded):
            print(f"mar: warning: {warning}", file=sys.stderr)
    raise typer.Exit(send(address, job, environment(env or []), detach))


@command(epilog="Example:  mar doctor --preset demo")
@expanded
def doctor(given: ConfigOptions) -> None:
    """Check Ray, paths, MLflow, weights and disk before a long job."""
    loaded = given.load()
    from jobs.doctor.examine import examine, show

    raise typer.Exit(0 if show(examine(loaded)) else 1)


@command(epilog="Example:  mar plan --preset mar_large --gpus 16 --gpu h100")
@expanded
def plan(options: PlanOptions, given: ConfigOptions) -> None:
    """Estimate memory, time, disk and network of a training."""
    loaded = given.load()
    from jobs import planning

    there, classes = planning.images_and_classes(loaded)
    kind = planning.gpu(options.gpu, options.peak_tflops, options.memory_gb)
    assumed = planning.Assumptions(kind, options.gpus, options.epochs, options.images or there, classes, options.efficiency, options.rate)
    print(dumps(planning.plain(loaded, assumed), indent=2) if options.json else planning.table(loaded, assumed))


@command("help", epilog="Example:  mar help train")
def help_command(command: Annotated[str, typer.Argument(metavar="[COMMAND]", help="command to explain; default: mar itself")] = "") -> None:
    """Show the help of a command."""
    typer.main.get_command(app)([*([command] if command else []), "--help"], prog_name="mar")


command("import", epilog="Example:  mar import checkpoint-last.pth --out runs/mar_base")(import_command)
command("export", epilog="Example:  mar export runs/mar_base --format released --out exported")(export)
command("reference", epilog="Example:  mar reference --preset demo --out runs/reference.npz")(expanded(reference_command))
command("inspect", epilog="Example:  mar inspect runs/demo/cache")(inspect_command)
command("verify", epilog="Example:  mar verify runs/demo/cache --sample 100")(verify_command)


def _print_summary(name: str, summary: dict[str, Any]) -> None:
    """Print the summary's figures as a table on stdout, one row for each entry of a mapping. A number that is not finite is shown as `nan`,
    or as `none` if it was read from a file."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, show_header=False, title_justify="left")
    for key, value in summary.items():
        if key in ("format_version", "stage", "identity"):
            continue
        for part, figure in value.items() if isinstance(value, dict) else [("", value)]:
            if figure is None or isinstance(figure, str | int | float):
                text = f"{figure:,.4g}" if isinstance(figure, float) else str("none" if figure is None else figure)
                table.add_row(f"{key} {part}".replace("_", " "), text)
    Console(markup=False, emoji=False).print(table)


def _print_next_steps(root: str, tracking_uri: str) -> None:
    from pipelines.runtime.tracking import without_password

    print(f"report: {root}/report.html")
    served = tracking_uri.startswith(("http://", "https://"))
    print(f"all metrics: {'' if served else 'mlflow ui --host 127.0.0.1 --backend-store-uri '}{without_password(tracking_uri)}")
    print("your own images: mar quickstart --print-config > mine.yaml, change images.source and all paths in it, then")
    print("                 mar quickstart --config mine.yaml")


if __name__ == "__main__":
    main()
