"""The command `mar`: one subcommand per stage, plus quickstart, report, submit, doctor, plan, import, export, inspect and verify."""

import signal
import sys
from collections.abc import Callable
from functools import partial
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cache_commands import Check, inspect_command, verify_command
from jobs.leaving import last_line
from jobs.path_options import Command, path_given
from jobs.released import export_command, import_command
from jobs.shortcuts import Film, Image, Label, Mask, Out, as_assignments
from jobs.stage_commands import STAGES
from jobs.stages import StageFailed, guarded, run_directory, run_stage, value_at
from pipelines.runtime.cluster.interruption import Terminated, raised
from pipelines.runtime.errors import UserError

if TYPE_CHECKING:
    from jobs.config.load import ConfigurationFile
    from jobs.config.schema import RunConfig

ConfigFile = Annotated[str | None, typer.Option("--config", metavar="FILE.yaml", help="settings that override the preset's")]
Preset = Annotated[str | None, typer.Option("--preset", metavar="NAME", help="demo, mar_base, mar_large, mar_huge")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override one setting; repeatable")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="print the whole configuration and exit")]


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


def _load(config: "str | ConfigurationFile | None", preset: str | None, assignments: list[str] | None, print_config: bool) -> "RunConfig":
    """Load the configuration and print its sources to stderr; with --print-config print the configuration and exit."""
    from jobs.config.load import load
    from pipelines.runtime.tracking import without_password

    loaded = load(preset, config, assignments or [])
    file = config if isinstance(config, str | None) else config.name
    sources = [f"preset {preset}" if preset else "defaults", *([file] if file else []), *(assignments or [])]
    source = ", ".join(without_password(one) for one in sources)
    if print_config:
        print(f"# {source}\n{loaded.yaml()}", end="")
        raise typer.Exit
    print(f"configuration: {source}", file=sys.stderr)
    return loaded


def _run(name: str, config: str | None, preset: str | None, assignments: list[str] | None, print_config: bool, **options: bool) -> None:
    loaded = _load(config, preset, assignments, print_config)
    stage = STAGES[name]
    for key in (*stage.reads, stage.writes):
        print(f"  {'writes' if key == stage.writes else 'reads':6} {key:15} {value_at(loaded, key) or '(not set)'}", file=sys.stderr)
    _print_summary(name, run_stage(name, loaded, **options))


def _stage_command(name: str) -> Callable[..., None]:
    def run(config: ConfigFile = None, preset: Preset = None, assignments: Assignments = None, print_config: PrintConfig = False) -> None:
        _run(name, config, preset, assignments, print_config)

    def run_generate(
        label: Label = None, image: Image = "", mask: Mask = "", film: Film = False, out: Out = "",
        config: ConfigFile = None, preset: Preset = None, assignments: Assignments = None, print_config: PrintConfig = False,
    ) -> None:  # fmt: skip
        short = as_assignments({"label": label, "image": image, "mask": mask, "film": film, "out": out})
        _run(name, config, preset, [*(assignments or []), *short], print_config)

    def run_cache(
        check: Check = False, config: ConfigFile = None, preset: Preset = None, assignments: Assignments = None,
        print_config: PrintConfig = False,
    ) -> None:  # fmt: skip
        _run(name, config, preset, assignments, print_config, check=check)

    if name == "cache":
        return run_cache
    return run_generate if name == "generate" else run


for _name, _stage in STAGES.items():
    command(_name, help=_stage.help, epilog=f"Example:  {_stage.example}")(_stage_command(_name))


@command(epilog="Example:  mar report runs/demo")
def report(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", callback=path_given, help="directory of the run; default: the parent of train.path")
    ] = "",
    config: ConfigFile = None,
    preset: Preset = None,
    assignments: Assignments = None,
    print_config: PrintConfig = False,
) -> None:
    """Write RUN/report.html, one page with all results."""
    given = {"--config": config, "--preset": preset, "--set": assignments, "--print-config": print_config}
    if unused := [option for option, value in given.items() if run and value]:
        raise UserError(f"report {run!r} uses no configuration, but {unused[0]} is given", remedy="give one of the two")
    run = run or run_directory(_load(config, preset, assignments, print_config))

    def work() -> str:
        from jobs.report.page import report as write_report

        return write_report(run)

    print(guarded("report", run, work))


@command(epilog="Example:  mar quickstart --set train.workers=1")
def quickstart(
    config: ConfigFile = None, preset: Preset = "demo", assignments: Assignments = None, print_config: PrintConfig = False
) -> None:
    """Run all stages, by default of the preset demo."""
    loaded = _load(config, preset, assignments, print_config)

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
def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND…", help="e.g. train --preset mar_base")],
    address: Annotated[
        str, typer.Option(metavar="URL", callback=path_given, help="the head node's dashboard; or RAY_API_SERVER_ADDRESS")
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="print the job's id and exit; the job continues")] = False,
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="environment variable of the job; repeatable")] = None,
    config: ConfigFile = None,
    preset: Preset = None,
    assignments: Assignments = None,
    print_config: PrintConfig = False,
) -> None:
    """Run a command on a Ray cluster and follow its log."""
    from jobs.submit import environment, job_command, outputs_lost_with_the_job, refuse_password, send

    job = job_command(typer.main.get_command(app), command, config, preset, assignments or [])
    if job.configured:
        loaded = _load(job.config, job.preset, job.assignments, print_config)
        refuse_password(loaded)
        for warning in outputs_lost_with_the_job(job, loaded):
            print(f"mar: warning: {warning}", file=sys.stderr)
    raise typer.Exit(send(address, job, environment(env or []), detach))


@command(epilog="Example:  mar doctor --preset demo")
def doctor(config: ConfigFile = None, preset: Preset = None, assignments: Assignments = None, print_config: PrintConfig = False) -> None:
    """Check Ray, paths, MLflow, weights and disk space before a long job."""
    loaded = _load(config, preset, assignments, print_config)
    from jobs.doctor import examine, show

    raise typer.Exit(0 if show(examine(loaded)) else 1)


@command(epilog="Example:  mar plan --preset mar_large --gpus 16 --gpu h100")
def plan(
    gpus: Annotated[int, typer.Option(metavar="N", help="number of GPUs")] = 16,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="h100, a100-80gb, …; `list` lists them all")] = "h100",
    epochs: Annotated[float, typer.Option(metavar="X", help="passes over the images")] = 400,
    images: Annotated[int, typer.Option(metavar="N", help="number of images; 0: the cache's, or ImageNet's without a cache")] = 0,
    efficiency: Annotated[float, typer.Option(metavar="X", help="MFU, as a share of the peak")] = 0.23,
    rate: Annotated[
        float | None, typer.Option("--images-per-second-per-gpu", metavar="X", help="measured, instead of --efficiency")
    ] = None,
    peak_tflops: Annotated[float | None, typer.Option(metavar="X", help="dense bf16 peak, for a GPU that is not listed")] = None,
    memory_gb: Annotated[float | None, typer.Option(metavar="X", help="memory, for a GPU that is not listed")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    config: ConfigFile = None,
    preset: Preset = None,
    assignments: Assignments = None,
    print_config: PrintConfig = False,
) -> None:
    """Estimate memory, time, disk and network of a training."""
    loaded = _load(config, preset, assignments, print_config)
    from jobs import planning

    cached, classes = planning.images_and_classes(loaded)
    kind = planning.gpu(gpu, peak_tflops, memory_gb)
    given = planning.Assumptions(kind, gpus, epochs, images or cached, classes, efficiency, rate)
    print(dumps(planning.plain(loaded, given), indent=2) if json else planning.table(loaded, given))


@command("help", epilog="Example:  mar help train")
def help_command(command: Annotated[str, typer.Argument(metavar="[COMMAND]", help="command to explain; default: mar itself")] = "") -> None:
    """Show the help of a command."""
    typer.main.get_command(app)([*([command] if command else []), "--help"], prog_name="mar")


command("import", epilog="Example:  mar import checkpoint-last.pth --out runs/mar_base")(import_command)
command("export", epilog="Example:  mar export runs/mar_base --format released --out exported")(export_command)
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
