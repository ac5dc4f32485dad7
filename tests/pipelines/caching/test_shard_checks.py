"""A shard with a flipped byte is found by whatever reads it, and a condemned cache is refused until it is repaired."""

from pathlib import Path

import numpy as np
import pytest
from test_latents import write_cache

from pipelines.caching.inspection.verifying import damages
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import shard_name
from pipelines.caching.shard_checks import CONDEMNED, absolve, condemn
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.training.data import LatentDataset

ROWS = [5, 4, 6, 7]
REPAIR = r"run `mar cache` with the same settings to make these shards again"


def flip(path: Path) -> str:
    """Flip one bit in the middle of a file; returns the file's new SHA-256."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return storage.digest(bytes(data))


def take(cache: LatentCache, row: int) -> None:
    cache.take(np.array([row]), np.array([False]))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(tmp_path / "cache", ROWS)
    return tmp_path / "cache"


def shard(cache: Path, number: int) -> Path:
    return cache / "shards" / shard_name(number)


def test_a_reader_compares_each_shard_once_when_it_opens_it(cache: Path) -> None:
    before = storage.digest(shard(cache, 2).read_bytes())
    after = flip(shard(cache, 2))
    opened = LatentCache(str(cache))
    take(opened, 0)  # of another shard
    with pytest.raises(
        UserError, match=rf"shard-00002\.arrow of {cache} is damaged: SHA-256 {after[:12]}…, expected {before[:12]}… .*{REPAIR}"
    ):
        take(opened, 9)
    with pytest.raises(UserError, match=rf"1 of the 4 shards of {cache} are damaged \(shard-00002\.arrow\); {REPAIR}"):
        LatentCache(str(cache))
    shard(cache, 0).write_bytes(bytes(len(shard(cache, 0).read_bytes())))
    take(opened, 0)  # it was compared when it was opened, and stays mapped


@pytest.mark.parametrize("window", [0, 2])
def test_a_data_set_compares_beside_the_reads_and_each_shard_in_one_worker(cache: Path, window: int) -> None:
    flip(shard(cache, 3))
    opened = [LatentCache(str(cache)) for _ in range(3)]
    sets = [LatentDataset(one, seed=1, window=window, checks=(worker, 3)) for worker, one in enumerate(opened)]
    failures = []
    for one in sets:
        try:
            for start in range(0, sum(ROWS), 2):
                one.read(start, start + 2, np.zeros(2, bool))
            one.settle_checks()
        except UserError as error:
            failures.append(str(error))
    assert len(failures) == 1
    assert "shard-00003.arrow" in failures[0]
    assert sorted(number for one in opened for number in one.checks.begun) == [0, 1, 2, 3]


def test_a_short_read_does_not_end_before_its_shards_are_compared(cache: Path) -> None:
    flip(shard(cache, 1))
    dataset = LatentDataset(LatentCache(str(cache)), seed=1)
    dataset.read(0, 1, np.zeros(1, bool))  # whichever row that is
    with pytest.raises(UserError, match=r"shard-00001\.arrow"):
        dataset.settle_checks()
    with pytest.raises(UserError, match=r"shard-00001\.arrow"):  # nothing is read after it
        dataset.read(1, 2, np.zeros(1, bool))


def test_what_verify_condemns_is_refused_until_all_is_well(cache: Path) -> None:
    whole = {number: shard(cache, number).read_bytes() for number in (1, 3)}
    for number in whole:
        flip(shard(cache, number))
    condemn(str(cache), [name for name, _ in damages(LatentCache(str(cache)))])
    with pytest.raises(UserError, match=rf"2 of the 4 shards .* are damaged \(shard-00001\.arrow, shard-00003\.arrow\); {REPAIR}"):
        LatentCache(str(cache))
    assert len(list(damages(LatentCache(str(cache), condemned=True)))) == 2
    for number, data in whole.items():
        shard(cache, number).write_bytes(data)
    assert not list(damages(LatentCache(str(cache), condemned=True)))
    absolve(str(cache))
    assert len(LatentCache(str(cache))) == sum(ROWS)


def test_many_condemned_shards_are_named_in_one_line(tmp_path: Path) -> None:
    write_cache(tmp_path, [1] * 30)
    condemn(str(tmp_path), [shard_name(number) for number in range(25)])
    condemn(str(tmp_path), [shard_name(29)])
    with pytest.raises(UserError, match=r"26 of the 30 shards .*shard-00009\.arrow and 16 more\)"):
        LatentCache(str(tmp_path))
    assert len(storage.read_json(str(tmp_path / CONDEMNED))["shards"]) == 26


def test_a_local_copy_of_the_right_length_is_compared_and_fetched_again(cache: Path, tmp_path: Path) -> None:
    def opened() -> LatentCache:
        return LatentCache(str(cache), str(tmp_path / "local"))

    found = opened()
    labels = found.labels()
    assert found.local is not None
    copy = found.local.folder / shard_name(2)
    flip(copy)
    with pytest.raises(UserError, match=rf"the copy {copy} is damaged and was deleted .*; run the same command again"):
        opened().labels()
    assert not copy.exists()
    np.testing.assert_array_equal(opened().labels(), labels)
    flip(copy)
    dataset = LatentDataset(opened(), seed=1)
    dataset.read(0, 22, np.zeros(22, bool))
    with pytest.raises(UserError, match=r"the copy .*shard-00002\.arrow is damaged"):
        dataset.settle_checks()
    np.testing.assert_array_equal(opened().labels(), labels)
    assert not (cache / CONDEMNED).exists()  # the cache itself is sound
