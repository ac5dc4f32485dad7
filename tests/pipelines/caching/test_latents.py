"""Reading a latent cache: the manifest, memory-mapped shards, the statistics."""

import os
import pickle
import resource
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import LatentStatistics, Manifest, shard_bytes, shard_name
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.training.data import LatentDataset

SHAPE = (4, 3, 3)  # 2 latent channels
ROWS = [5, 0, 1, 7]  # a shard of which every image was rejected has no rows


def write_cache(path: Path, rows: list[int], dtype: str = "float16") -> tuple[np.ndarray, np.ndarray]:
    """Random moments of image and mirror image, (sum(rows), 4, 3, 3) each, as a cache."""
    draw = np.random.default_rng(0)
    moments, flipped = draw.normal(size=(2, sum(rows), *SHAPE)).astype(dtype)
    shards, start = [], 0
    for number, count in enumerate(rows):
        part = slice(start, start + count)
        keys = [f"c/{row:02d}.png" for row in range(start, start + count)]
        data = shard_bytes(keys, list(range(start, start + count)), moments[part], flipped[part])
        storage.write_bytes(storage.join(str(path), "shards", shard_name(number)), data)
        shards.append({"name": shard_name(number), "rows": count, "sha256": storage.digest(data), "bytes": len(data)})
        start += count
    statistics = LatentStatistics.of(moments).merged(LatentStatistics.of(flipped))
    manifest = Manifest(
        format_version=1, rows=sum(rows), shards=shards, class_names=["c"], image_size=6, latent_size=3, latent_channels=2,
        dtype=dtype, latent_mean=statistics.mean, latent_std=statistics.std, latent_min=statistics.min,
        latent_max=statistics.max, tokenizer={"digest": "0" * 64}, images={}, rejected=0,
    )  # fmt: skip
    storage.write_json(storage.join(str(path), "manifest.json"), manifest.as_dict())
    return moments, flipped


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentCache, np.ndarray, np.ndarray]:
    path = tmp_path_factory.mktemp("cache")
    moments, flipped = write_cache(path, ROWS)
    return LatentCache(str(path)), moments, flipped


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(st.tuples(st.integers(0, sum(ROWS) - 1), st.booleans()), max_size=40))
def test_take_equals_direct_reads(written: tuple[LatentCache, np.ndarray, np.ndarray], wanted: list[tuple[int, bool]]) -> None:
    cache, moments, flipped = written
    indices, mirror = np.array([row for row, _ in wanted], np.int64), np.array([one for _, one in wanted], bool)
    found, labels = cache.take(indices, mirror)
    assert (str(found.dtype), str(labels.dtype), found.shape) == ("float16", "int64", (len(wanted), *SHAPE))
    np.testing.assert_array_equal(found, np.where(mirror[:, None, None, None], flipped[indices], moments[indices]))
    np.testing.assert_array_equal(labels, indices)
    assert cache.keys(indices) == [f"c/{row:02d}.png" for row in indices]


def test_whole_cache(written: tuple[LatentCache, np.ndarray, np.ndarray]) -> None:
    cache, moments, _ = written
    again = pickle.loads(pickle.dumps(cache))
    assert (len(again), again.moments_shape, again.digest) == (13, SHAPE, cache.digest)
    assert cache.digest == storage.digest(Path(cache.path, "manifest.json").read_bytes())
    assert again.labels().tolist() == list(range(13))
    np.testing.assert_array_equal(again.take(np.arange(13), np.zeros(13, bool))[0], moments)
    assert len(pickle.dumps(cache)) < 500  # the path alone


@pytest.mark.parametrize("indices", [[13], [-1, 3]])
def test_rows_that_are_not_there(written: tuple[LatentCache, np.ndarray, np.ndarray], indices: list[int]) -> None:
    with pytest.raises(IndexError, match="of a latent cache of 13"):
        written[0].take(np.array(indices), np.zeros(len(indices), bool))


def test_float32_and_the_schema(tmp_path: Path) -> None:
    moments, _ = write_cache(tmp_path, [3], "float32")
    found, _ = LatentCache(str(tmp_path)).take(np.arange(3), np.zeros(3, bool))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, moments)
    schema = pa.ipc.open_file(tmp_path / "shards" / shard_name(0)).schema
    assert schema.field("moments").type == pa.list_(pa.float32(), 36) == schema.field("moments_flipped").type
    assert schema.metadata[b"moments_shape"] == b"[4, 3, 3]"


def test_shards_are_mapped_and_no_file_stays_open(tmp_path: Path) -> None:
    write_cache(tmp_path, [1] * 150)
    cache = LatentCache(str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        assert cache.labels().tolist() == list(range(150))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert str(tmp_path / "shards" / shard_name(149)) in Path("/proc/self/maps").read_text()


def test_what_else_lies_on_the_local_disk_is_left_there(tmp_path: Path) -> None:
    moments, _ = write_cache(tmp_path / "cache", [4] * 6)
    other = tmp_path / "disk" / "my_dataset" / "data-00000-of-00001.arrow"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(10_000_000))
    size = max(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir())
    for _ in range(2):  # two caches in one place have room together
        cache = LatentCache(str(tmp_path / "cache"), str(tmp_path / "disk"), 3.5 * size / 1e9)
        np.testing.assert_array_equal(cache.take(np.arange(24), np.zeros(24, bool))[0], moments)
        assert sum(path.stat().st_size for path in (tmp_path / "disk").glob("*/shard-*.arrow")) <= 3.5 * size
        manifest = tmp_path / "cache" / "manifest.json"
        manifest.write_text(manifest.read_text() + "\n")
    assert other.stat().st_size == 10_000_000


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a finished latent cache .* run `mar cache`"):
        LatentCache(str(tmp_path))
    write_cache(tmp_path, [2, 2])
    shard = tmp_path / "shards" / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00001\.arrow has .* bytes, expected \d+ bytes as in the manifest"):
        LatentCache(str(tmp_path)).take(np.array([2]), np.array([False]))
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.arrow is missing"):
        LatentCache(str(tmp_path)).take(np.array([3]), np.array([False]))
    manifest = storage.read_json(str(tmp_path / "manifest.json"))
    storage.write_json(str(tmp_path / "manifest.json"), {**manifest, "format_version": 2})
    with pytest.raises(UserError, match="format_version 2, expected 1"):
        LatentCache(str(tmp_path))


def test_statistics_equal_numpy_on_the_whole() -> None:
    draw = np.random.default_rng(0)
    moments = draw.normal(size=(50, 6, 4, 4)) * 3 + 100.0  # an offset that sums of squares alone would lose digits to
    moments[:, 3:] = draw.normal(size=(50, 3, 4, 4)) * 25  # log-variances beyond the clamp on both sides
    merged = LatentStatistics.of(moments[:7]).merged(LatentStatistics.of(moments[7:8])).merged(LatentStatistics.of(moments[8:]))
    means, variances = moments[:, :3], np.exp(np.clip(moments[:, 3:], -30, 20))
    axes = (0, 2, 3)
    np.testing.assert_allclose(merged.mean, means.mean(axes), rtol=1e-13)
    np.testing.assert_allclose(merged.std, np.sqrt(means.var(axes) + variances.mean(axes)), rtol=1e-12)
    np.testing.assert_array_equal(merged.min, means.min(axes))
    np.testing.assert_array_equal(merged.max, means.max(axes))


def test_std_is_that_of_posterior_samples() -> None:
    draw = np.random.default_rng(1)
    moments = np.concatenate([draw.normal(size=(4000, 1, 4, 4)) * 0.7, np.full((4000, 1, 4, 4), np.log(0.4))], axis=1)
    samples = moments[:, 0] + np.exp(0.5 * moments[:, 1]) * draw.normal(size=(4000, 4, 4))
    assert LatentStatistics.of(moments).std[0] == pytest.approx(samples.std(), rel=0.01)


@pytest.mark.parametrize("window", [0, 2])
def test_batches_do_not_depend_on_workers_nor_on_where_a_run_goes_on(
    written: tuple[LatentCache, np.ndarray, np.ndarray], window: int
) -> None:
    cache, moments, flipped = written
    dataset = LatentDataset(cache, seed=5, window=window)
    whole = list(islice(dataset.batches(0, 6), 9))  # 54 positions: four epochs of 13 rows and a bit
    shared = [list(islice(dataset.batches(0, 6, worker=worker, workers=4), 9)) for worker in range(4)]
    for number, batch in enumerate(whole):
        assert batch.position == 6 * number
        assert torch.equal(torch.cat([one[number].moments for one in shared]), batch.moments)
        assert torch.equal(torch.cat([one[number].labels for one in shared]), batch.labels)
    later = list(islice(LatentDataset(cache, seed=5, window=window).batches(30, 6), 4))
    assert all(torch.equal(a.moments, b.moments) for a, b in zip(later, whole[5:], strict=True))

    labels = torch.cat([one.labels for one in whole]).numpy()  # the label of a record is its row
    for epoch in range(4):
        assert sorted(labels[13 * epoch : 13 * (epoch + 1)].tolist()) == list(range(13))
    found = torch.cat([one.moments for one in whole]).numpy()
    mirrored = [np.array_equal(one, flipped[row]) for one, row in zip(found, labels, strict=True)]
    assert all(mirror or np.array_equal(one, moments[row]) for mirror, one, row in zip(mirrored, found, labels, strict=True))
    assert 10 < sum(mirrored) < 44
    assert not any(
        np.array_equal(one, flipped[row]) for one, row in zip(next(dataset.batches(0, 54, flip=False)).moments.numpy(), labels, strict=True)
    )
