"""The commands: help, examples, exit statuses, what is said on failure and on Ctrl-C."""

import importlib
import inspect
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from command_line import Mar

from jobs import cli, stages
from jobs.config.load import load
from jobs.config.schema import RunConfig
from jobs.stage_commands import STAGES
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage

GROUP = typer.main.get_command(cli.app)
COMMANDS = [
    "tokenize",
    "cache",
    "train",
    "generate",
    "evaluate",
    "sweep",
    "report",
    "quickstart",
    "submit",
    "doctor",
    "plan",
    "help",
    "import",
    "export",
    "reference",
    "inspect",
    "verify",
]
CONFIGURED = [
    name for name in COMMANDS if name not in ("import", "export", "inspect", "verify", "help")
]  # those are told all by their own options


def test_the_seventeen_commands_are_there() -> None:
    assert list(GROUP.commands) == COMMANDS  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_ends_in_an_example_that_parses(mar: Mar, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = mar(*([command] if command else []), "--help")
    lines = result.out.rstrip().splitlines()
    assert result.status == 0
    assert len(lines) <= (24 if command else 30)
    assert max(len(line) for line in lines) <= 80
    assert "..." not in "".join(lines[3:])  # nothing cut off
    example = lines[-1].strip().removeprefix("Example:  mar ")
    assert example != lines[-1].strip()
    name, *rest = shlex.split(example)
    if command:
        assert name == command
    given = GROUP.commands[name].make_context(name, rest).params  # type: ignore[attr-defined]
    if name in CONFIGURED:
        load(given["preset"], given["config"], given["assignments"] or [])


@pytest.mark.parametrize("command", CONFIGURED)
def test_every_command_takes_the_four_configuration_options(command: str) -> None:
    options = {option for one in GROUP.commands[command].params for option in one.opts}  # type: ignore[attr-defined]
    assert {"--config", "--preset", "--set", "--print-config"} <= options


def test_help_is_quick_and_needs_neither_ray_nor_torch() -> None:
    code = "import sys; sys.argv = ['mar']; import jobs.cli; print([one for one in ('ray', 'torch', 'mlflow') if one in sys.modules])"
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert time.monotonic() - start < 5


def test_an_unknown_command_names_the_nearest(mar: Mar) -> None:
    result = mar("trian")
    assert result.status == 2
    assert "Did you mean 'train'?" in result.err


def test_help_and_version_as_words(mar: Mar) -> None:
    from mar_model import __version__

    assert mar("--version").out == f"mar {__version__}\n"
    assert mar("help").out == mar("--help").out
    assert mar("help", "train").out == mar("train", "--help").out
    unknown = mar("help", "trian")
    assert (unknown.status, "Did you mean 'train'?" in unknown.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--config", "a.yaml", "--config=b.yaml"), "--config is given 2 times, expected once"),
        (("generate", "--out", "a", "--label", "1", "--label", "2", "--out", "b"), "--out is given 2 times"),
        (("report", "runs/x", "--set", "train.path=runs/y/train"), "report 'runs/x' uses no configuration, but --set is given"),
        (("report", "runs/x", "--preset", "demo"), "report 'runs/x' uses no configuration, but --preset is given"),
        (("submit", "--preset", "demo", "--", "verify", "c"), "verify c uses no configuration, but --preset is given"),
        (("submit", "--config", "a.yaml", "--", "train", "--config", "b.yaml"), "--config is given twice, 'a.yaml' and 'b.yaml'"),
        (
            ("train", "--set", "generate.ema=false", "--set", "generate.ema_decay=0.99"),
            "generate.ema_decay is 0.99, but generate.ema is false",
        ),
    ],
)
def test_nothing_that_is_given_is_ignored(mar: Mar, words: tuple[str, ...], said: str) -> None:
    result = mar(*words)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert said in result.err


def test_no_configuration_is_named_where_none_is_used(mar: Mar, tmp_path: Path) -> None:
    result = mar("report", str(tmp_path))
    assert (result.status, "configuration:" in result.err) == (2, False)


def stand_in(monkeypatch: pytest.MonkeyPatch, work: Any) -> list[dict[str, Any]]:
    """Put `work(**sections)` in the place of the stages train and cache, and an open stage without Ray around it."""
    calls: list[dict[str, Any]] = []

    def function(**sections: Any) -> dict[str, Any]:
        calls.append(sections)
        return work()

    class Opened:
        def __init__(self, *arguments: Any, seed: int) -> None:
            self.arguments, self.seed = arguments, seed

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("pipelines.runtime.stage.open_stage", Opened)
    monkeypatch.setattr(stages.importlib, "import_module", lambda _: SimpleNamespace(train=function, cache=function))
    return calls


def test_a_stage_gets_its_sections_and_its_summary_is_shown(mar: Mar, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, lambda: {"format_version": 1, "images_seen": 1280, "loss": 0.123456, "rows": {"noise": 297.5}})
    result = mar("train", "--preset", "demo", "--set", "seed=5")
    assert result.status == 0
    assert set(calls[0]) == {"images", "tokenizer_path", "cache", "model", "train", "generate", "evaluate", "stage"}
    assert calls[0]["stage"].seed == 5
    assert calls[0]["tokenizer_path"] == str(Path("runs/demo/tokenizer").absolute())
    assert calls[0]["images"].settings == load("demo").located().images
    name, path, configuration, cluster, tracking = calls[0]["stage"].arguments
    assert (name, path) == ("train", str(Path("runs/demo/train").absolute()))
    assert (configuration, cluster, tracking) == (load("demo", assignments=["seed=5"]).plain(), load("demo").cluster, load("demo").tracking)
    assert "configuration: preset demo, seed=5" in result.err
    assert "runs/demo/cache" in result.err
    assert "images seen" in result.out
    assert "1280" in result.out
    assert "0.1235" in result.out
    assert "rows noise" in result.out
    assert "297.5" in result.out


def test_the_cache_is_asked_to_read_every_image_again(mar: Mar, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, lambda: {"images": 1})
    assert [mar("cache", *options, "--preset", "demo").status for options in ((), ("--check",))] == [0, 0]
    assert [call["check"] for call in calls] == [False, True]
    assert set(calls[0]) == {"images", "tokenizer_path", "cache", "stage", "check"}


def test_what_looks_like_markup_of_the_terminal_is_text(
    mar: Mar, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "runs/[bold]x[/a]/:cat:/y"
    stand_in(monkeypatch, lambda: {"checkpoint": odd})
    assert odd in mar("train", "--preset", "demo").out
    Stage("test", ClusterSettings()).say(odd)
    assert capsys.readouterr().err == f"test: {odd}\n"


def test_a_user_error_in_a_worker_is_a_user_error(mar: Mar, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(Exception):  # as Ray wraps what a task raised
        cause = UserError("images.source 'x' is not there")

    def fail() -> dict[str, Any]:
        raise RuntimeError("a worker group failed") from Wrapped("RayTaskError: …")

    stand_in(monkeypatch, fail)
    result = mar("train", "--preset", "demo")
    assert result.status == 2
    assert result.err.splitlines()[-1] == "mar: error: images.source 'x' is not there"


def test_a_failure_says_its_cause_and_where_the_traceback_is(mar: Mar, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class GroupFailed(Exception):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.worker_failures = {1: MemoryError("no memory for 3 GB\nFailed to apply …")}

    def fail() -> dict[str, Any]:
        raise GroupFailed("one of 2 workers")

    stand_in(monkeypatch, fail)
    result = mar("train", "--set", f"train.path={tmp_path}")
    assert result.status == 1
    assert "mar: train failed: MemoryError: no memory for 3 GB" in result.err
    assert f"the traceback is in {tmp_path}/error.log" in result.err
    assert "GroupFailed: one of 2 workers" in (tmp_path / "error.log").read_text()


def test_a_failure_in_a_worker_of_ray_data_says_what_happened_there(mar: Mar, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray.data.exceptions import SystemException
    from ray.exceptions import RayTaskError

    def fail() -> dict[str, Any]:
        cause = RuntimeError("no kernel for that\nFailed to apply UDF transform after 1/1 attempts")
        raise RayTaskError("map", "Traceback: …", cause).as_instanceof_cause() from SystemException()

    stand_in(monkeypatch, fail)
    result = mar("train", "--set", f"train.path={tmp_path}")
    assert result.status == 1
    assert "mar: train failed: RuntimeError: no kernel for that\n" in result.err


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_ctrl_c_and_sigterm_say_how_to_go_on(mar: Mar, monkeypatch: pytest.MonkeyPatch, number: int, status: int, word: str) -> None:
    def interrupt() -> dict[str, Any]:
        signal.raise_signal(number)
        raise AssertionError("not interrupted")

    stand_in(monkeypatch, interrupt)
    result = mar("train", "--preset", "demo", "--set", "generate.labels=[1, 2]")
    assert result.status == status
    assert result.err.splitlines()[-1] == f"mar: {word}; to resume: mar train --preset demo --set 'generate.labels=[1, 2]'"


@pytest.mark.parametrize("name", list(STAGES))
def test_every_stage_takes_the_sections_it_is_called_with(name: str) -> None:
    module, _, function = STAGES[name].function.partition(":")
    there = getattr(importlib.import_module(module), function, None)
    assert there is not None, f"{STAGES[name].function} is not there"
    needed = {one.name for one in inspect.signature(there).parameters.values() if one.default is one.empty}
    assert needed == {*STAGES[name].arguments, "stage"}


def test_every_section_decides_what_a_quickstart_is() -> None:
    from jobs.quickstart.stage import _identity

    config = load("demo")
    assert {name.partition(".")[0] for name in _identity(config, "listing")} == RunConfig.model_fields.keys() - {"tracking", "cluster"}


def test_passwords_are_not_shown(mar: Mar, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda: {"images_seen": 1})
    result = mar("train", "--preset", "demo", "--set", "tracking.uri=http://me:p@ss:secret@host:5000")
    assert result.status == 0
    assert "tracking.uri=http://host:5000" in result.err
    assert not [part for part in ("p@ss", "secret") if part in result.err + result.out]


def test_a_job_with_a_password_on_its_command_line_is_refused(mar: Mar) -> None:
    result = mar("submit", "--address", "http://127.0.0.1:1", "--", "train", "--set", "tracking.uri=http://me:secret@host:5000")
    assert result.status == 2
    assert "MLFLOW_TRACKING_PASSWORD" in result.err
    assert "secret" not in result.err
