"""What every stage does alike: claim its output, refuse another's, track when there is work, and leave no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage, open_stage
from pipelines.runtime.tracking import TrackingSettings

IDENTITY = {"train.batch": 8, "seed": 1}


def test_an_output_is_claimed_by_what_has_been_made(tmp_path: Path) -> None:
    path = str(tmp_path / "out")
    stage = Stage("train", ClusterSettings(), {"seed": 1})
    assert stage.begin(path, IDENTITY) is None
    assert storage.read_json(f"{path}/configuration.json") == {"seed": 1}
    assert stage.begin(path, {**IDENTITY, "seed": 2}) is None  # nothing made yet: a mended mistake is not held against its maker
    storage.write_bytes(f"{path}/checkpoints/one", b"work")
    with pytest.raises(UserError, match=r"differing settings: seed \(found 2, expected 3\)"):
        stage.begin(path, {**IDENTITY, "seed": 3})
    assert stage.begin(path, {**IDENTITY, "seed": 2}) is None
    written = stage.complete(path, {**IDENTITY, "seed": 2}, {"images_seen": 64})
    assert stage.begin(path, {**IDENTITY, "seed": 2}) == written
    assert stage.begin(path, {**IDENTITY, "seed": 2}, enough=lambda summary: summary["images_seen"] > 64) is None


def test_a_finished_run_in_mlflow_is_left_alone(ray_local: ClusterSettings, tmp_path: Path) -> None:
    """Not touched by a start that finds all complete, nor by one that is refused."""
    tracking, path = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db"), str(tmp_path / "out")
    with open_stage("train", path, {"seed": 1}, ray_local, tracking) as stage:
        assert stage.begin(path, IDENTITY) is None
        storage.write_bytes(f"{path}/model", b"weights")
        stage.complete(path, IDENTITY, {"images_seen": 64, "loss": 0.5})
    client = MlflowClient(tracking.uri)
    run_id = storage.read_json(f"{path}/mlflow_run.json")["run_id"]
    before = client.get_run(run_id).to_dictionary()
    assert before["info"]["status"] == "FINISHED"
    assert [one.step for one in client.get_metric_history(run_id, "loss")] == [64]
    with open_stage("train", path, {"seed": 1}, ray_local, tracking) as stage:
        assert stage.begin(path, IDENTITY) is not None
    with pytest.raises(UserError, match="another configuration"), open_stage("train", path, {"seed": 2}, ray_local, tracking) as stage:
        stage.begin(path, {**IDENTITY, "seed": 2})
    assert client.get_run(run_id).to_dictionary() == before


def test_two_runs_never_share_an_output(ray_local: ClusterSettings, tmp_path: Path) -> None:
    tracking, path = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db"), str(tmp_path / "out")
    with (
        open_stage("train", path, {}, ray_local, tracking),
        pytest.raises(UserError, match=rf"in use by another run \(process {os.getpid()}\)"),
        open_stage("train", path, {}, ray_local, tracking),
    ):
        raise AssertionError("two at once")
    with open_stage("train", path, {}, ray_local, tracking):
        pass  # the lock went with its holder


WAITING = """
import sys, time
from pathlib import Path
from pipelines.runtime.cluster.connection import ClusterSettings, connected
import ray
with connected(ClusterSettings(cpus=1), Path(sys.argv[1]) / "ray.log"):
    @ray.remote
    class Holder:
        def pid(self):
            import os
            return os.getpid()
    holder = Holder.remote()
    (Path(sys.argv[1]) / "pid").write_text(str(ray.get(holder.pid.remote())))
    time.sleep(120)
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, -signal.SIGINT), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)])
def test_an_interrupted_stage_takes_its_ray_along_and_no_other(
    ray_local: ClusterSettings, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment.pop("RAY_ADDRESS", None)
    others = {one.pid for one in psutil.Process().children(recursive=True)}
    process = subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    own = psutil.Process(process.pid).children(recursive=True)
    assert int((tmp_path / "pid").read_text()) in {one.pid for one in own}
    process.send_signal(sent)
    assert process.wait(timeout=60) == status
    assert not [one for one in own if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert {pid for pid in others if psutil.pid_exists(pid)} == others  # this test's own Ray runs on
