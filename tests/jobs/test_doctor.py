"""`mar doctor`: every row both ways, and the estimate in closed form."""

import dataclasses
import http.server
import json
import shutil
import socket
import sqlite3
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from command_line import DemoIn, Mar

from jobs.config.load import load
from jobs.doctor import examine as doctor
from jobs.doctor.paths import _bucket_refuses
from jobs.estimate import cache_bytes, checkpoint_bytes, latent_shape, parameters, sample_bytes
from pipelines.evaluation.statistics import FeatureStatistics


def test_a_missing_thing_is_a_cross_with_its_remedy_and_status_1(mar: Mar, demo_in: DemoIn, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        demo_in(f"images.source={tmp_path}/none", "evaluate.features=inception", "cluster.address=127.0.0.1:1").yaml()
    )
    result = mar("doctor", "--config", str(tmp_path / "mine.yaml"))
    assert result.status == 1
    crosses = [line.split()[1] for line in result.out.splitlines() if line.startswith("✗")]
    assert crosses == ["ray", "images.source", "feature"]
    assert "its SHA-256 begins with 6726825d" in result.out
    assert result.out.splitlines()[-1] == "3 to fix"


def test_the_workers_of_the_widest_stage_are_counted(demo_in: DemoIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.runtime.cluster.connection.connected", lambda *_: nullcontext())
    monkeypatch.setattr("pipelines.runtime.cluster.workers.cluster_resources", lambda: (4.0, 2.0))
    assert [check.ok for check in doctor.ray_checks(demo_in("cache.encoders=4", "cluster.gpus_per_worker=0.5"))] == [True, True, True]
    ray, cpus, gpus = doctor.ray_checks(demo_in("cache.encoders=5", "cluster.gpus_per_worker=0.5"))
    assert ray.ok
    assert (cpus.ok, gpus.ok) == (False, False)
    assert cpus.found == "5 needed (cache.encoders 5, 1 each), 4 available"
    assert gpus.found == "2.5 needed (cache.encoders 5, 0.5 each), 2 available"
    assert "lower cache.encoders" in cpus.remedy
    *_, gpus = doctor.ray_checks(demo_in("generate.actors=4", "evaluate.actors=1", "cluster.gpus_per_worker=0.5"))
    assert gpus.found == "2.5 needed (generate.actors 4 and evaluate.actors 1, 0.5 each), 2 available"


def test_a_cluster_that_does_not_answer_is_known_at_once(demo_in: DemoIn) -> None:
    [check] = doctor.ray_checks(demo_in("cluster.address=127.0.0.1:1"))
    assert not check.ok
    assert "cluster at 127.0.0.1:1" in check.found


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert doctor.output_check("train.path", str(tmp_path / "a" / "b")).ok
    check = doctor.output_check("train.path", "/proc/mar")
    assert not check.ok
    assert "writable" in check.remedy


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    check = doctor.output_check("train.path", str(tmp_path / "file" / "train"))
    assert not check.ok
    assert "is a file" in check.found


@pytest.fixture
def health() -> Iterator[tuple[str, list[str | None]]]:
    """The address of a server that is healthy for whoever has a password, and the credentials it saw."""
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_tracking(tmp_path: Path, health: tuple[str, list[str | None]]) -> None:
    host, seen = health
    assert doctor.tracking_check(f"http://{host}").ok
    assert doctor.tracking_check(f"http://me:secret@{host}/") == doctor.Check(
        "tracking.uri", True, f"http://{host}/", doctor.tracking_check(f"http://{host}").remedy
    )
    assert "Basic bWU6c2VjcmV0" in seen
    assert not doctor.tracking_check(f"http://{host}/elsewhere").ok
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "refused" in doctor.tracking_check(f"http://127.0.0.1:{unused.getsockname()[1]}").found
    assert doctor.tracking_check(f"sqlite:///{tmp_path}/new/mlflow.db").ok
    sqlite3.connect(tmp_path / "there.db").execute("CREATE TABLE runs (id)").connection.close()
    assert doctor.tracking_check(f"sqlite:///{tmp_path}/there.db").ok
    (tmp_path / "text.db").write_text("no database " * 100)
    assert "not a database" in doctor.tracking_check(f"sqlite:///{tmp_path}/text.db").found
    assert not doctor.tracking_check("mysql://host/db").ok


def test_weights(tmp_path: Path, demo_in: DemoIn) -> None:
    config = demo_in()
    assert "`mar tokenize` writes it" in doctor.tokenizer_check(config).found
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "config.json").write_text(json.dumps({"kind": "pixels", "format_version": 1}))
    found = doctor.tokenizer_check(config)
    assert found.ok
    assert len(found.found.split(": ")[1]) == 64
    assert doctor.network_check(config).found.startswith("efficientnet-lite0: ")
    (tmp_path / "weights.pth").write_bytes(b"other weights")
    wrong = doctor.network_check(demo_in("evaluate.features=inception", f"evaluate.weights={tmp_path}/weights.pth"))
    assert not wrong.ok
    assert "expected 6726825d" in wrong.found


def test_the_estimate_in_closed_form() -> None:
    base = load("mar_base")
    assert latent_shape(base) == (16, 16)
    # a record of KL-16 is 16 KB a flip in float16 (architecture, contract 2)
    assert cache_bytes(base, 1) == 2 * 16384
    assert cache_bytes(load("mar_base", assignments=["cache.dtype=float32"]), 1_281_167) == 1_281_167 * 4 * 16384
    assert checkpoint_bytes(base, classes=1000) == 207_924_768 * 16 * 4
    assert sample_bytes(base) == 50_000 * 256 * 256 * 3
    pixels = load("mar_base", assignments=["tokenizer.kind=pixels", "images.size=64", "model.patch_size=4"])
    assert latent_shape(pixels) == (3, 64)
    assert cache_bytes(pixels, 1) == 2 * 6 * 64 * 64 * 2
    wide = dataclasses.replace(base.model, denoiser_width=2048)
    assert parameters(base.model_copy(update={"model": wide}), 1000) > parameters(base, 1000)


def test_disk_space(demo_in: DemoIn, monkeypatch: pytest.MonkeyPatch) -> None:
    config = demo_in("evaluate.path=s3://bucket/evaluation")
    wanted = cache_bytes(config, 100) + checkpoint_bytes(config, 10)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, wanted))
    [check] = doctor.disk_checks(config, 100, 10)
    assert check.ok
    assert "evaluate.path" not in check.found
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, wanted - 1))
    [check] = doctor.disk_checks(config, 100, 10)
    assert not check.ok
    assert f"{wanted / 1e9:.2f} GB needed" in check.found


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="there")
    yield f"endpoint_override={host}:{port}&scheme=http"
    server.stop()


def test_s3(bucket: str) -> None:
    import boto3

    assert doctor.output_check("train.path", "s3://there/run/train").ok
    left = [one["Key"] for one in boto3.client("s3").list_objects_v2(Bucket="there").get("Contents", [])]
    assert left in ([], ["run/train/"])  # at most the empty marker of a folder that Arrow keeps
    assert _bucket_refuses(f"s3://there/run?{bucket}") is None
    missing = doctor.output_check("train.path", "s3://absent/run/train")
    assert not missing.ok
    assert "bucket absent does not exist" in missing.found
    reference = doctor.input_check("evaluate.reference", "s3://there/reference.npz")
    assert not reference.ok
    assert "does not exist" in reference.found
    boto3.client("s3").put_object(Bucket="there", Key="reference.npz", Body=b"x")
    assert "reference.npz is damaged" in doctor.input_check("evaluate.reference", "s3://there/reference.npz").found
    FeatureStatistics(np.zeros(2), np.eye(2), 3, "inception", "0").save("s3://there/reference.npz")
    assert doctor.input_check("evaluate.reference", "s3://there/reference.npz").ok
