"""Other libraries open a shard and see the same numbers."""

from pathlib import Path

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.feather
import pytest
from datasets import load_dataset

from pipelines.caching.latent_format import shard_bytes

SHAPE = (4, 3, 3)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    moments, flipped = np.random.default_rng(0).normal(size=(2, 5, *SHAPE)).astype(np.float16)
    path = tmp_path_factory.mktemp("shards") / "shard-00000.arrow"
    path.write_bytes(shard_bytes([f"c/{row} ü.png" for row in range(5)], list(range(5)), moments, flipped))
    return path, moments, flipped


def check(shard: tuple[Path, np.ndarray, np.ndarray], keys: object, labels: object, moments: object, flipped: object) -> None:
    _, expected, expected_flipped = shard
    assert list(keys) == [f"c/{row} ü.png" for row in range(5)]  # type: ignore[call-overload]
    assert list(labels) == list(range(5))  # type: ignore[call-overload]
    for found, right in ((moments, expected), (flipped, expected_flipped)):
        np.testing.assert_array_equal(np.array([np.asarray(one) for one in found], np.float16).reshape(5, *SHAPE), right)  # type: ignore[attr-defined]


def test_pyarrow(shard: tuple[Path, np.ndarray, np.ndarray]) -> None:
    with pa.memory_map(str(shard[0])) as source:
        table = pa.ipc.open_file(source).read_all()
        columns = [table.column(name).to_pylist() for name in ("key", "label", "moments", "moments_flipped")]
    check(shard, *columns)


def test_pandas(shard: tuple[Path, np.ndarray, np.ndarray]) -> None:
    frame = pd.read_feather(shard[0])
    check(shard, frame["key"], frame["label"], frame["moments"], frame["moments_flipped"])


def test_polars(shard: tuple[Path, np.ndarray, np.ndarray]) -> None:
    frame = polars.read_ipc(shard[0])
    check(shard, frame["key"], frame["label"], frame["moments"].to_list(), frame["moments_flipped"].to_list())


def test_datasets(shard: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    found = load_dataset("arrow", data_files=str(shard[0]), split="train", cache_dir=str(tmp_path))
    check(shard, found["key"], found["label"], found["moments"], found["moments_flipped"])
