"""`mar submit`, of `mar doctor` among others, against a real head node with its dashboard and its token, on this machine."""

import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from command_line import DemoIn, Mar

from jobs import cli, submit
from jobs.config.load import load
from pipelines.runtime.errors import UserError

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard of a head node on ports of its own; afterwards its processes are ended, and nobody else's."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as taken, tempfile.TemporaryDirectory(prefix="mar-") as folder:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # an activated environment
        sockets = [taken.enter_context(socket.socket()) for _ in range(4)]
        for one in sockets:
            one.bind(("", 0))
        port, dashboard, agent, client = (one.getsockname()[1] for one in sockets)
        taken.close()
        log = tmp_path_factory.mktemp("head") / "head.log"
        command = [
            *("ray", "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats", f"--port={port}"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        ]
        with log.open("w") as output:
            process = psutil.Popen(command, stdout=output, stderr=output)
        try:
            give_up = time.monotonic() + 240
            while "--block" not in log.read_text().partition("Ray runtime started")[2]:  # the last words of its start
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < give_up, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            started = process.children(recursive=True)
            process.terminate()
            _, alive = psutil.wait_procs([process, *started], timeout=15)
            for one in alive:
                one.kill()
            psutil.wait_procs(alive, timeout=15)


def job(*words: str, **over: Any) -> submit.Job:
    return submit.job_command(typer.main.get_command(cli.app), words, over.get("config"), over.get("preset"), over.get("assignments", []))


def test_a_submitted_job_streams_its_log_and_ends_with_its_exit_status(
    head: str, mar: Mar, demo_in: DemoIn, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # --address must win
    file = tmp_path / "mine.yaml"  # lies outside the project: its settings must travel all the same
    file.write_text(demo_in(f"images.source={images}", "generate.labels=[1, 0]").yaml())
    odd = "tracking.experiment=a 'quoted' $HOME"
    detached = mar("submit", "--address", head, "--detach", "--", "train", "--config", str(file), "--set", odd, "--print-config")
    assert detached.status == 0
    job_id = detached.out.strip()
    assert job_id.startswith("raysubmit_")

    well = mar("submit", "--address", head, "--env", "COLUMNS=250", "--", "doctor", "--config", str(file))
    assert well.status == 0, well.out
    rows = [line for line in well.out.splitlines() if line.startswith(("✓", "✗"))]
    assert "2 CPUs, 0 GPUs" in rows[0]
    assert "cluster at" in rows[0]
    assert all(row.startswith("✓ ") for row in rows)
    assert "16 images, 4 of them held out, 2 classes" in well.out
    assert well.out.splitlines()[-1] == "all checks passed"
    assert not list(tmp_path.rglob(".mar-doctor*"))
    assert not (tmp_path / "train").exists()  # looking makes nothing

    sick = mar("submit", "--address", head, "--", "report", f"{tmp_path}/none")
    assert sick.status == 2, sick.out
    assert f"mar: error: '{tmp_path}/none' holds no finished stage" in sick.out
    assert "FAILED" in sick.err

    client = submit._client(head)
    give_up = time.monotonic() + 30
    while not client.get_job_info(job_id).status.is_terminal() and time.monotonic() < give_up:
        time.sleep(0.5)
    assert client.get_job_info(job_id).status.value == "SUCCEEDED"
    log = client.get_job_logs(job_id)
    (tmp_path / "printed.yaml").write_text(log[log.index("# defaults") :])
    assert load(file=str(tmp_path / "printed.yaml")) == load(file=str(file), assignments=[odd])


def test_a_wrong_token_is_refused_in_words(head: str, mar: Mar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    wrong = mar("submit", "--address", head, "--", "doctor")
    assert wrong.status == 2
    assert "the token found here is rejected" in wrong.err
    assert "RAY_AUTH_TOKEN_PATH" in wrong.err


def test_the_token_is_looked_for_where_ray_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert submit._token() == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert submit._token() == "home"
    (tmp_path / "token").write_text("named")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert submit._token() == "named"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert submit._token() == "given"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert submit._token() == ""


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(head: str, mar: Mar, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_follow", interrupt)
    result = mar("submit", "--address", head, "--", "train", "--print-config")
    assert result.status == 130
    assert f"keeps running; to stop it: ray job stop --address {head} raysubmit_" in result.err


def test_addresses_that_do_not_answer(mar: Mar) -> None:
    silent = mar("submit", "--address", "http://127.0.0.1:1", "--", "train", "--preset", "demo")
    assert silent.status == 2
    assert "--address 'http://127.0.0.1:1' does not answer" in silent.err
    for address in ("127.0.0.1:8265", "ray://127.0.0.1:10001"):
        result = mar("submit", "--address", address, "--", "train", "--preset", "demo")
        assert result.status == 2
        assert f"--address is {address!r}, expected the http:// address" in result.err


def test_a_bad_configuration_is_refused_before_anything_is_sent(mar: Mar) -> None:
    result = mar("submit", "--address", "http://127.0.0.1:1", "--", "train", "--set", "train.batchs=3")
    assert result.status == 2
    assert "train.batchs is not a known key; nearest: train.batch" in result.err
    assert "nearest: train" in mar("submit", "--", "trian").err
    assert "'submit', expected one of" in mar("submit", "--", "submit", "--", "train").err
    assert "expected KEY=VALUE" in mar("submit", "--env", "KEY", "--", "train").err


def test_the_entrypoint_carries_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {batch: 256}\nsweep: {parameters: {generate.temperature: [0.9, 1.0]}}\n")
    words = shlex.split(job("mar", "train", "--set", "seed=2", preset="demo", config=str(file), assignments=["seed=1"]).entrypoint())
    assert words[:6] == ["python", "-m", "jobs.cli", "train", "--preset", "demo"]
    assignments = [text for option, text in zip(words[6::2], words[7::2], strict=True) if option == "--set"]
    assert assignments[-2:] == ["seed=1", "seed=2"]
    assert load("demo", assignments=assignments) == load("demo", str(file), ["seed=2"])
    assert job("train", "--preset", "mar_base", preset="demo").preset == "mar_base"
    assert job("train", "--preset=mar_base", preset="demo").preset == "mar_base"
    assert job("quickstart").preset == "demo"
    assert job("quickstart", preset="mar_base").preset == "mar_base"
    assert job("report", "runs/demo").arguments == ["runs/demo"]
    with pytest.raises(UserError, match="expected one of tokenize"):
        job("rm")


def test_relative_outputs_are_warned_of() -> None:
    train = job("train", "--preset", "demo")
    [warning] = submit.outputs_lost_with_the_job(train, load("demo"))
    assert "train.path (runs/demo/train), tracking.uri (runs/demo/mlflow.db)" in warning
    elsewhere = ["train.path=s3://bucket/run", "tracking.uri=http://mlflow:5000"]
    assert submit.outputs_lost_with_the_job(train, load("demo", assignments=elsewhere)) == []
    assert submit.outputs_lost_with_the_job(job("doctor"), load("demo")) == []


def test_only_the_code_travels() -> None:
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sent: list[str] = []
    _dir_travel(
        submit.PROJECT,
        [_get_excludes(submit.PROJECT, submit.EXCLUDES)],
        lambda path: sent.append(str(path.relative_to(submit.PROJECT))),
        include_gitignore=True,
    )
    assert {
        "jobs/cli.py",
        "jobs/config/presets/demo.yaml",
        "pipelines/runtime/stage.py",
        "mar_model/tokenizers/kl.py",
        "pyproject.toml",
    } <= set(sent)
    assert {path.split("/")[0] for path in sent} == {".", "jobs", "pipelines", "mar_model", "pyproject.toml"}
    assert not any("__pycache__" in path for path in sent)
