"""Training on a cluster whose nodes come and go, one without a word, one with a notice: it goes on with those that are there."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from test_training_workers import RECIPE, Listening, losses, meanwhile
from tiny_cache import ARCHITECTURE, TOKENIZER, write_latents

from pipelines.caching.settings import CacheSettings
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.supervision.controller import ROOM_SECONDS
from pipelines.training.stage import train

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node with one CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_health_check_period_ms", "1000")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheSettings:
    return write_latents(tmp_path_factory.mktemp("cache"))


def drain(node_id: str, seconds: float) -> None:
    """The notice that a cloud gives before it takes a machine away."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, reason = client.drain_node(
        node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", int((time.time() + seconds) * 1000)
    )
    assert accepted, reason


def test_a_group_waits_for_room_for_its_fewest(nodes: Cluster, cache: CacheSettings, tmp_path: Path) -> None:
    stage, run = Listening(ClusterSettings(autoscaling=True)), replace(RECIPE, path=str(tmp_path), workers=3, workers_min=2)
    waiting, began = "the cluster has no resources for 2 workers: waiting", time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, TOKENIZER.path, cache, ARCHITECTURE, run, stage)
        while waiting not in stage.said and time.monotonic() < began + 60:
            time.sleep(0.05)
        waited, second = time.monotonic() - began, nodes.add_node(num_cpus=1)
        try:
            summary = training.result()
        finally:
            nodes.remove_node(second)
    assert ROOM_SECONDS < waited < 60
    assert summary["images_seen"] == RECIPE.images
    assert stage.said.count(waiting) == 1
    assert [line[0] for line in stage.said if "workers running again" in line] == ["2"]


def test_a_lost_node_and_one_that_gives_notice(nodes: Cluster, cache: CacheSettings, tmp_path: Path) -> None:
    first, second = nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    stage = Listening(ClusterSettings())
    run = replace(RECIPE, path=str(tmp_path), images=3200, workers=3, workers_min=1)

    def give_notice() -> None:
        while not any("running again" in line for line in stage.said):
            time.sleep(0.05)
        drain(second.node_id, 60)

    with meanwhile(tmp_path, [(160, lambda: nodes.remove_node(first, allow_graceful=False)), (320, give_notice)]):
        summary = train(TOKENIZER.path, cache, ARCHITECTURE, run, stage)
    assert summary["images_seen"] == 3200
    text = "\n".join(stage.said)
    assert "died" in text
    assert "will be pre-empted" in text
    assert [line[0] for line in stage.said if "workers running again" in line] == ["2", "1"]
    assert len(losses(tmp_path)) == 20
