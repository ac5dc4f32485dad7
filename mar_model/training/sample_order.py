"""The order in which training reads the rows of a cache: keyed permutations, which are computed and never stored."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

ROUNDS = 8  # one 64-bit key each, from one BLAKE2b digest


class Order(Protocol):
    """The row at each global position (images seen): a pure function of seed and position."""

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Rows at positions start … stop − 1, int64 (stop − start,); the range may span several epochs."""


class Permutation:
    """A permutation of 0 … size − 1 that depends on `key` alone. Any part of it can be computed separately, in constant memory.

    A balanced Feistel network over the smallest 4^k ≥ size, restricted to the range by cycle walking (Black & Rogaway 2002).
    """

    def __init__(self, size: int, key: object) -> None:
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = np.frombuffer(hashlib.blake2b(repr(key).encode()).digest(), dtype="<u8")

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The values at these places, int64."""
        return self._walk(places, self._forward)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """The places of these values, int64."""
        return self._walk(values, self._backward)

    def _walk(self, values: np.ndarray, step: "_Step") -> np.ndarray:
        values = step(values.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:  # fewer than 4 walks on average, because the domain is smaller than 4 · size
            values[outside] = step(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _forward(self, values: np.ndarray) -> np.ndarray:
        left, right = self._halves(values)
        for key in self._keys:
            left, right = right, left ^ self._scrambled(right, key)
        return self._joined(left, right)

    def _backward(self, values: np.ndarray) -> np.ndarray:
        left, right = self._halves(values)
        for key in self._keys[::-1]:
            left, right = right ^ self._scrambled(left, key), left
        return self._joined(left, right)

    def _halves(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return values >> np.uint64(self._half_bits), values & np.uint64((1 << self._half_bits) - 1)

    def _joined(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        joined: np.ndarray = (left << np.uint64(self._half_bits)) | right
        return joined

    def _scrambled(self, half: np.ndarray, key: np.uint64) -> np.ndarray:
        scrambled: np.ndarray = _mix(half ^ key) >> np.uint64(64 - self._half_bits)
        return scrambled


class _Step(Protocol):
    def __call__(self, values: np.ndarray) -> np.ndarray: ...


class SampleOrder:
    """The row at each global position: position p is place p mod rows in epoch p // rows; each epoch is a permutation of all rows."""

    def __init__(self, seed: int, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}, expected 1 or more")
        self.seed, self.rows = int(seed), int(rows)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Rows at positions start … stop − 1 (images seen), int64 (stop − start,); the range may span several epochs."""
        parts = [np.empty(0, np.int64)]
        for epoch, place, count in _by_epoch(start, stop, self.rows):
            parts.append(self._permutation(epoch)(np.arange(place, place + count)))
        return np.concatenate(parts)

    def positions(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """The positions of these rows in `epoch`, int64: the inverse of `indices`."""
        return epoch * self.rows + self._permutation(epoch).inverse(np.asarray(rows))

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self.rows, ("sample order", self.seed, epoch))


class WindowedOrder:
    """The order for a cache larger than the local disk: each epoch permutes the shards, then the rows within each window of `window`
    consecutive shards. Memory is proportional to the number of shards, not of rows."""

    def __init__(self, seed: int, shard_rows: Sequence[int], window: int) -> None:
        """Raises ValueError if there are no rows, or `window` is below 1."""
        self.seed, self.window = int(seed), int(window)
        self.shard_rows = np.asarray(shard_rows, np.int64)
        self.rows = int(self.shard_rows.sum())
        if self.rows < 1 or self.window < 1:
            raise ValueError(f"{self.rows} rows in windows of {self.window} shards, expected 1 or more of both")
        self._starts = np.cumsum(self.shard_rows) - self.shard_rows
        self._epoch = lru_cache(maxsize=2)(self._shuffled_shards)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Rows at positions start … stop − 1 (images seen), int64 (stop − start,); the range may span several epochs and windows."""
        parts = [np.empty(0, np.int64)]
        for epoch, place, count in _by_epoch(start, stop, self.rows):
            shards, ends = self._epoch(epoch)
            while count:
                window = int(np.searchsorted(ends, place, side="right"))
                first = int(ends[window - 1]) if window else 0
                taken = min(count, int(ends[window]) - place)
                parts.append(self._rows_of(epoch, window, shards, np.arange(place - first, place - first + taken)))
                place, count = place + taken, count - taken
        return np.concatenate(parts)

    def shards_from(self, position: int, count: int) -> list[int]:
        """At most `count` shards: those of the window at this position, followed by the next windows'."""
        epoch, place = divmod(position, self.rows)
        shards, ends = self._epoch(epoch)
        first = int(np.searchsorted(ends, place, side="right")) * self.window
        found = shards[first : first + count]
        if len(found) < count:
            found = np.concatenate([found, self._epoch(epoch + 1)[0][: count - len(found)]])
        return list(dict.fromkeys(found.tolist()))

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and the places at which its windows end."""
        shards = Permutation(len(self.shard_rows), ("shard order", self.seed, epoch))(np.arange(len(self.shard_rows)))
        ends = np.cumsum(self.shard_rows[shards])[self.window - 1 :: self.window]
        return shards, ends if len(ends) and ends[-1] == self.rows else np.append(ends, self.rows)

    def _rows_of(self, epoch: int, window: int, shards: np.ndarray, places: np.ndarray) -> np.ndarray:
        mine = shards[window * self.window : (window + 1) * self.window]
        ends = np.cumsum(self.shard_rows[mine])
        inside = Permutation(int(ends[-1]), ("window order", self.seed, epoch, window))(places)
        numbers = np.searchsorted(ends, inside, side="right")
        rows: np.ndarray = self._starts[mine[numbers]] + inside - (ends - self.shard_rows[mine])[numbers]
        return rows


def _by_epoch(start: int, stop: int, rows: int) -> list[tuple[int, int, int]]:
    """(epoch, first place, count) for the positions start … stop − 1."""
    if not 0 <= start <= stop:
        raise ValueError(f"positions {start} to {stop}, expected 0 <= start <= stop")
    parts = []
    while start < stop:
        epoch, place = divmod(start, rows)
        count = min(stop - start, rows - place)
        parts.append((epoch, place, count))
        start += count
    return parts


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
