"""The Grafana dashboard: each metric it asks for is exported by a real Ray, and a real Prometheus, where one is installed, answers
each of its queries with data."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.training.metrics import prometheus

GRAFANA = Path(__file__).resolve().parents[2] / "infra" / "grafana"
ROW = {
    "images_seen": 2048, "loss": 0.5, **{f"loss_band_{band}": 0.1 * band for band in range(4)}, "gradient_norm": 1.0,
    "skipped_share": 0.25, "learning_rate": 1e-4, "images_per_second": 64.0, "tflops_per_worker": 0.5, "mfu": 0.23, "data_wait_share": 0.01,
}  # fmt: skip
SHARES = {"worker_images_per_second": 32.0, "data_wait_share": 0.01, "communication_share": 0.05, "checkpoint_share": 0.0}


def queries() -> list[str]:
    """Every expression of the dashboard, as Grafana would send it."""
    dashboard = json.loads((GRAFANA / "training.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [expression.replace("$run", ".*").replace("$__rate_interval", "30s") for expression in found]


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@ray.remote(num_cpus=0)
class Worker:
    """Tells what a worker of training does, in a process of its own."""

    def __init__(self, number: int) -> None:
        self.number, self.gauges = number, prometheus.Gauges("demo/train", number)

    def tell(self) -> None:
        self.gauges.of_worker(32, SHARES, {"host": 1e9})
        if self.number == 0:
            self.gauges.of_run(ROW)
            self.gauges.of_validation({"fid": 12.5})

    def tell_run(self, row: dict[str, float]) -> None:
        self.gauges.of_run(row)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Two workers in a local Ray instance that report their figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        with connected(ClusterSettings(cpus=1), tmp_path_factory.mktemp("ray") / "ray.log"):
            workers = [Worker.remote(number) for number in range(2)]  # type: ignore[attr-defined]
            ray.get([one.tell.remote() for one in workers])
            yield workers


@pytest.fixture(scope="module")
def agent(workers: list[Any]) -> str:
    """host:port of the metrics of that Ray."""
    (node,) = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def exposed(agent: str) -> dict[str, list[str]]:
    """name → its lines on the agent's page."""
    with urllib.request.urlopen(f"http://{agent}/metrics", timeout=10) as page:
        lines = [line for line in page.read().decode().splitlines() if line.startswith("ray_mar_train_")]
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line.partition("{")[0], []).append(line)
    return found


def until(done: Any, seconds: float = 240.0) -> Any:
    """What `done()` gives once it is true."""
    end = time.monotonic() + seconds
    while not (result := done()):
        assert time.monotonic() < end, f"not within {seconds} s: {done}"
        time.sleep(0.2)
    return result


def test_a_real_ray_exports_what_the_dashboard_asks_for(agent: str) -> None:
    wanted = set().union(*map(metrics_of, queries()))
    assert wanted == prometheus.exported()  # nothing is asked for that isn't told, nothing told that isn't shown
    found = until(lambda: page if wanted <= (page := exposed(agent)).keys() and len(page["ray_mar_train_images_total"]) == 2 else None)
    assert {float(line.rpartition(" ")[2]) for line in found["ray_mar_train_mfu"]} == {0.23}
    assert all('run="demo/train"' in line for lines in found.values() for line in lines)
    assert len(found["ray_mar_train_loss_band"]) == 4
    assert sum(float(line.rpartition(" ")[2]) for line in found["ray_mar_train_images_total"]) == 64  # 32 of each of two workers
    assert {re.findall(r'worker="(\d)"', line)[0] for line in found["ray_mar_train_memory_bytes"]} == {"0", "1"}


def test_a_mean_over_nothing_leaves_a_gap_in_its_series_alone(workers: list[Any], agent: str) -> None:
    """Ray does not export a gauge of NaN, and the others still are; where there is a number again, it is exported again."""
    first = workers[0]
    try:
        for _ in range(2):
            nothing = {**ROW, "loss": math.nan, "loss_band_3": math.nan, "gradient_norm": math.nan, "skipped_share": 1.0}
            ray.get(first.tell_run.remote(nothing))
            page = until(lambda: page if "ray_mar_train_loss" not in (page := exposed(agent)) else None)
            assert prometheus.exported() - page.keys() == {"ray_mar_train_loss", "ray_mar_train_gradient_norm"}
            assert sorted(re.findall(r'band="(\d)"', "".join(page["ray_mar_train_loss_band"]))) == ["0", "1", "2"]
            assert {line.rpartition(" ")[2] for line in page["ray_mar_train_skipped_share"]} == {"1.0"}
            ray.get(first.tell_run.remote(ROW))
            until(lambda: prometheus.exported() == exposed(agent).keys())
    finally:
        ray.get(first.tell_run.remote(ROW))


@pytest.mark.long
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian: apt-get install prometheus)")
def test_a_real_prometheus_answers_every_query(agent: str, tmp_path: Path) -> None:
    until(lambda: prometheus.exported() <= exposed(agent).keys())
    (tmp_path / "targets.json").write_text(json.dumps([{"targets": [agent]}]))  # as Ray's own list of nodes is laid out
    configuration = yaml.safe_load((GRAFANA / "prometheus.yaml").read_text())
    configuration["global"]["scrape_interval"] = "3s"
    (scraped,) = configuration["scrape_configs"]
    scraped["file_sd_configs"][0]["files"] = [str(tmp_path / "targets.json")]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path}/prometheus.yaml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:

        def answers(query: str) -> list[Any]:
            try:
                with urllib.request.urlopen(
                    f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}", timeout=10
                ) as reply:
                    return list(json.load(reply)["data"]["result"])
            except OSError:
                return []

        (seen,) = until(lambda: answers("max(ray_mar_train_images_seen)"))
        assert float(seen["value"][1]) == 2048
        for query in queries():
            assert until(lambda query=query: answers(query)), query
        assert len(answers(next(query for query in queries() if "worker_images" in query and "worker)" in query))) == 2
    finally:
        server.terminate()
        server.wait()
