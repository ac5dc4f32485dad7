"""A node that is lost while a cache is made: its shards are made elsewhere, and nobody can tell afterwards."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from benchmarks.source_forms import encoded, write_tree
from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer
from pipelines.caching import shards
from pipelines.caching.worker import EncodingJob, ShardEncoder
from pipelines.images.listing import list_images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings

pytestmark = pytest.mark.long

IMAGES = {f"a/{number:03d}.png": encoded(64, 64, number) for number in range(240)}
SHARD = 20


def test_an_encoder_and_a_node_die_and_no_byte_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    torch.manual_seed(0)
    save_tokenizer(
        KLAutoencoder(KLConfig(channels=2, width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)), tmp_path / "tokenizer"
    )
    images = ImageSettings(source=write_tree(tmp_path / "images", IMAGES), size=64)
    rows, wanted = list_images(images).rows, shards.shards_of(len(IMAGES), SHARD)
    job = EncodingJob(images, str(tmp_path / "tokenizer"), str(tmp_path / "lost"), 8, "float16", "float32", 1, ClusterSettings())

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        finished = list[int]()
        for index, _, _ in shards.make(job, 2, ray.put(rows), wanted):
            finished.append(index)
            if len(finished) == 2:
                mine = psutil.Process().children(recursive=True)
                encoder = next(one for one in mine if "ShardEncoder" in " ".join(one.cmdline()))
                os.kill(encoder.pid, signal.SIGKILL)
            if len(finished) == 4:
                cluster.remove_node(second)
        assert sorted(finished) == sorted(wanted)
    finally:
        ray.shutdown()
        cluster.shutdown()

    threads = torch.get_num_threads()
    try:
        alone = ShardEncoder(EncodingJob(**{**vars(job), "path": str(tmp_path / "alone")}), rows)
        for shard in wanted.values():
            alone.make(shard.index, shard.start, shard.stop)
    finally:
        torch.set_num_threads(threads)
    names = storage.list_files(str(tmp_path / "alone" / "shards"))
    assert names == storage.list_files(str(tmp_path / "lost" / "shards"))
    for name in names:
        assert (tmp_path / "alone" / "shards" / name).read_bytes() == (tmp_path / "lost" / "shards" / name).read_bytes(), name
