"""The order of training: a permutation an epoch, computable anywhere."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mar_model.training.sample_order import SampleOrder, WindowedOrder


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**63), rows=st.integers(1, 5000), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(seed: int, rows: int, epoch: int) -> None:
    order = SampleOrder(seed, rows).indices(epoch * rows, (epoch + 1) * rows)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(rows))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(7, 300), cuts=st.lists(st.integers(0, 1000), min_size=1, max_size=6))
def test_any_cut_of_the_positions_gives_the_same_order(seed: int, rows: int, cuts: list[int]) -> None:
    whole = SampleOrder(seed, rows).indices(0, 1000)
    edges = [0, *sorted(cuts), 1000]
    parts = [SampleOrder(seed, rows).indices(start, stop) for start, stop in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("rows", [2**16 - 1, 2**16, 2**16 + 1, 1_281_167])
def test_large_epochs(rows: int) -> None:
    assert len(np.unique(SampleOrder(1, rows).indices(0, rows))) == rows


def test_epochs_and_seeds_differ() -> None:
    orders = [SampleOrder(seed, 1000).indices(epoch * 1000, epoch * 1000 + 1000) for seed in (0, 1) for epoch in (0, 1, 2)]
    for first in range(6):
        for second in range(first):
            assert (orders[first] == orders[second]).sum() < 10  # 1 expected of two independent permutations


def test_places_are_uniform_and_neighbours_unrelated() -> None:
    rows, trials = 30, 3000
    orders = np.stack([SampleOrder(seed, rows).indices(0, rows) for seed in range(trials)])
    counts = np.stack([np.bincount(orders[:, place], minlength=rows) for place in range(rows)])
    chi_square = ((counts - trials / rows) ** 2 / (trials / rows)).sum()
    assert abs(chi_square - 29**2) < 5 * (2 * 29**2) ** 0.5
    long = SampleOrder(0, 100_000).indices(0, 100_000).astype(float)
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.015


def test_the_order_is_written_down() -> None:
    """A resumed run must find the order of the version that began it."""
    assert SampleOrder(0, 10).indices(0, 20).tolist() == [8, 1, 3, 9, 5, 0, 4, 2, 6, 7, 1, 4, 6, 0, 5, 8, 7, 9, 2, 3]
    assert SampleOrder(7, 1_281_167).indices(10**9, 10**9 + 4).tolist() == [991322, 890082, 881170, 1051785]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4)])
def test_ranges_that_are_none(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"positions {start} to {stop}"):
        SampleOrder(0, 10).indices(start, stop)


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="rows is 0"):
        SampleOrder(0, 0)
    assert SampleOrder(0, 5).indices(3, 3).shape == (0,)


def test_the_inverse_finds_every_row_again() -> None:
    for rows in (1, 2, 7, 64, 1000):
        order = SampleOrder(5, rows)
        for epoch in (0, 3):
            positions = order.positions(np.arange(rows), epoch)
            assert sorted(positions.tolist()) == list(range(epoch * rows, (epoch + 1) * rows))
            assert order.indices(epoch * rows, (epoch + 1) * rows)[positions - epoch * rows].tolist() == list(range(rows))
    billions = SampleOrder(1, 2_000_000_000)
    found = billions.indices(2_345_678_901, 2_345_679_925)
    assert billions.positions(found, 1).tolist() == list(range(2_345_678_901, 2_345_679_925))


@settings(max_examples=60, deadline=None)
@given(shards=st.lists(st.integers(1, 9), min_size=1, max_size=12), window=st.integers(1, 14), seed=st.integers(0, 3))
def test_windowed_order_is_a_permutation_of_each_epoch_window_by_window(shards: list[int], window: int, seed: int) -> None:
    order = WindowedOrder(seed, shards, window)
    rows, shard_of = sum(shards), np.repeat(np.arange(len(shards)), shards)
    for epoch in range(2):
        found = order.indices(epoch * rows, (epoch + 1) * rows)
        assert sorted(found.tolist()) == list(range(rows))
        place = read = 0
        while place < rows:  # a window is read to its end before the next begins
            mine = order.shards_from(epoch * rows + place, window)[: len(shards) - read]
            count = sum(shards[one] for one in mine)
            assert set(shard_of[found[place : place + count]].tolist()) == set(mine)
            place, read = place + count, read + len(mine)
    assert [int(order.indices(place, place + 1)[0]) for place in range(rows)] == order.indices(0, rows).tolist()
    straddling = order.indices(rows // 2, rows + rows // 2)
    assert straddling.tolist() == [*order.indices(rows // 2, rows), *order.indices(rows, rows + rows // 2)]


def test_windowed_order_differs_by_epoch_and_seed_and_mixes_inside_a_window() -> None:
    orders = [WindowedOrder(seed, [100] * 20, 5).indices(start, start + 2000).tolist() for seed in (0, 1) for start in (0, 2000)]
    assert len({tuple(one) for one in orders}) == 4
    first = np.array(orders[0][:500]) // 100
    assert min(np.bincount(first[:100], minlength=20)[list(set(first.tolist()))]) > 5  # of each of the five shards
    assert sorted(WindowedOrder(0, [0, 3, 0, 0, 2], 2).indices(0, 5).tolist()) == [0, 1, 2, 3, 4]  # shards of rejects alone
    with pytest.raises(ValueError, match="0 shards, expected 1 or more"):
        WindowedOrder(0, [1], 0)
