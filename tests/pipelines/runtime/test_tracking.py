"""The MLflow record of a stage, read back with MLflow's own client: from SQLite and from a real server."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.runtime.errors import UserError
from pipelines.runtime.tracking import LONGEST_PARAMETER, Tracker, TrackingSettings, flatten, without_password


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    return TrackingSettings(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/store/mlflow.db")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_flatten_names_every_key_and_cuts_long_values() -> None:
    flat = flatten({"train": {"batch": 8, "beta1": 0.9}, "sweep": {"parameters": {"generate.temperature": [0.9, 1]}}, "seed": 3})
    assert flat == {
        "train.batch": "8",
        "train.beta1": "0.9",
        "sweep.parameters": '{"generate.temperature": [0.9, 1]}',
        "seed": "3",
    }
    cut = flatten({"a": {"b": "x" * 7000}})["a.b"]
    assert len(cut) == LONGEST_PARAMETER
    assert cut.endswith("… (cut: 7000 characters)")


def test_runs_nest_and_hold_configuration_metrics_and_artefacts(settings: TrackingSettings, tmp_path: Path) -> None:
    said: list[str] = []
    configuration = {"train": {f"key{i}": i for i in range(150)}, "model": {"empty": "", "long": "y" * 9000}}
    parent = Tracker.open(settings, "pipeline", {}, str(tmp_path / "run"))
    child = Tracker.open(settings, "train", configuration, str(tmp_path / "run/train"), parent, said.append)
    for step in range(0, 2500, 2):
        child.log({"loss": step / 10, "bad": math.nan}, step)
    (tmp_path / "picture.txt").write_text("pixels")
    child.artifact(str(tmp_path / "picture.txt"))
    child.close()
    parent.close("KILLED")

    client = MlflowClient(settings.uri)
    run = client.get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert child.parent is parent
    assert run.info.run_name == "train"
    assert run.info.status == "FINISHED"
    assert client.get_run(parent.run_id).info.status == "KILLED"
    assert len(run.data.params) == 152
    assert run.data.params["train.key149"] == "149"
    assert len(run.data.params["model.long"]) == LONGEST_PARAMETER
    history = client.get_metric_history(child.run_id, "loss")
    assert sorted((one.step, one.value) for one in history) == [(step, step / 10) for step in range(0, 2500, 2)]
    assert math.isnan(run.data.metrics["bad"])
    assert said == []
    root = Path(settings.uri.removeprefix("sqlite:///")).parent / "artifacts"
    assert (root / child.run_id / "artifacts" / "picture.txt").read_text() == "pixels"


def test_the_newest_value_of_a_run_that_diverged_is_nan_and_sorts_last(tmp_path: Path) -> None:
    settings = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = {}
    for name, last in (("good", 0.5), ("nan", math.nan), ("infinite", math.inf), ("minus", -math.inf)):
        one = Tracker.open(settings, name, {}, str(tmp_path / name))
        one.log({"loss": 0.25}, 1)
        one.log({"loss": last}, 2)
        one.close()
        runs[one.run_id] = name
    client = MlflowClient(settings.uri)
    for run, name in runs.items():
        history = [point.value for point in client.get_metric_history(run, "loss")]
        assert history == pytest.approx([0.25, 0.5 if name == "good" else math.nan], nan_ok=True)
    experiment = client.get_experiment_by_name(settings.experiment).experiment_id
    for order in ("ASC", "DESC"):
        assert runs[client.search_runs([experiment], order_by=[f"metrics.loss {order}"])[0].info.run_id] == "good"
    assert client.search_runs([experiment], "metrics.loss < 0.4") == []


def test_a_resumed_stage_goes_on_in_its_run(settings: TrackingSettings, tmp_path: Path) -> None:
    first = Tracker.open(settings, "train", {"train": {"batch": 8, "workers": 1}}, str(tmp_path))
    first.log({"loss": 2.0}, 10)
    first._flush()  # then killed: no close
    again = Tracker.open(settings, "train", {"train": {"batch": 8, "workers": 2, "new": 5}}, str(tmp_path))
    again.log({"loss": 1.0}, 20)
    again.close()
    assert again.run_id == first.run_id
    client = MlflowClient(settings.uri)
    run = client.get_run(again.run_id)
    assert run.data.params == {"train.batch": "8", "train.workers": "1", "train.new": "5"}
    assert run.data.tags["resumed.train.workers"] == "2"
    assert "resumed.train.batch" not in run.data.tags
    assert [one.value for one in client.get_metric_history(again.run_id, "loss")] == [2.0, 1.0]

    elsewhere = TrackingSettings(uri=settings.uri, experiment="other")
    client.delete_run(again.run_id)
    assert Tracker.open(elsewhere, "train", {}, str(tmp_path)).run_id != first.run_id


def test_another_artefact_root_for_the_same_experiment_is_refused(settings: TrackingSettings, tmp_path: Path) -> None:
    own = TrackingSettings(uri=settings.uri, experiment="own root", artifacts=str(tmp_path / "root"))
    one = Tracker.open(own, "cache", {}, str(tmp_path / "a"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("1")
    one.artifact(str(tmp_path / "folder"))
    assert (tmp_path / "root" / one.run_id / "artifacts" / "folder" / "file").exists()
    own.artifacts = str(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"tracking.artifacts .*elsewhere.* keeps its artefacts at .*root"):
        Tracker.open(own, "cache", {}, str(tmp_path / "b"))


def test_a_server_that_is_not_there_is_named_quickly_and_without_its_password(tmp_path: Path) -> None:
    port = free_port()
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        Tracker.open(TrackingSettings(uri=f"http://me:hunter2@127.0.0.1:{port}"), "train", {}, str(tmp_path))
    assert time.monotonic() - began < 20
    text = str(caught.value)
    assert f"'http://127.0.0.1:{port}'" in text
    assert "hunter2" not in text
    assert "tracking.uri=sqlite" in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    assert without_password("postgresql://a:b@host/db") == "postgresql://host/db"


def test_a_file_that_is_no_database_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not a folder")
    with pytest.raises(UserError, match="set it to a writable sqlite"):
        Tracker.open(TrackingSettings(uri=f"sqlite:///{tmp_path}/notes/mlflow.db"), "train", {}, str(tmp_path))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real MLflow server (one worker) on the loopback, ended by its process group."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "served")]
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        until = time.monotonic() + 240
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    pytest.fail((tmp_path / "server.log").read_text())
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_real_server_takes_the_run_and_may_go_away(server: tuple[str, "subprocess.Popen[bytes]"], tmp_path: Path) -> None:
    uri, process = server
    said: list[str] = []
    one = Tracker.open(TrackingSettings(uri=uri), "evaluate", {"evaluate": {"images": 500}}, str(tmp_path / "run"), say=said.append)
    one.log({"frechet_distance_efficientnet-lite0": 12.5, "loss": math.nan}, 500)
    (tmp_path / "samples.png").write_bytes(b"png")
    one.artifact(str(tmp_path / "samples.png"))
    run = MlflowClient(uri).get_run(one.run_id)
    assert run.data.metrics == {"frechet_distance_efficientnet-lite0": 12.5, "loss": pytest.approx(math.nan, nan_ok=True)}
    assert [file.name for file in (tmp_path / "served").rglob("*") if file.is_file()] == ["samples.png"]
    assert said == []

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    one.log({"loss": 1.0}, 1)
    one._flush()
    one.close()  # the work is done: nothing is raised
    assert "does not answer" in said[0]
    assert "1 metrics were not stored" in said[1]
    assert len(said) == 3
