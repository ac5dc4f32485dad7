"""The order in which training sees the rows of a cache: a keyed permutation an epoch, computed and never stored."""

import hashlib

import numpy as np

ROUNDS = 8  # one 64-bit key each, from one BLAKE2b digest


class SampleOrder:
    """Row of each global position: position p is place p mod rows of epoch p // rows.

    Each epoch's permutation is a balanced Feistel network over the smallest 4^k ≥ rows, restricted to the rows by cycle
    walking (Black & Rogaway 2002), keyed by (seed, epoch): any part of it can be computed alone, in constant memory.
    """

    def __init__(self, seed: int, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}, expected 1 or more")
        self.seed, self.rows = int(seed), int(rows)
        self._half_bits = max(1, ((self.rows - 1).bit_length() + 1) // 2)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Rows at positions start … stop − 1 (images seen), int64 (stop − start,); the range may straddle epochs."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions {start} to {stop}, expected 0 <= start <= stop")
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, place = divmod(start, self.rows)
            end = min(stop, (epoch + 1) * self.rows)
            parts.append(self._permute(np.arange(place, place + end - start, dtype=np.uint64), epoch))
            start = end
        return np.concatenate(parts)

    def _permute(self, places: np.ndarray, epoch: int) -> np.ndarray:
        keys = np.frombuffer(hashlib.blake2b(repr(("sample order", self.seed, epoch)).encode()).digest(), dtype="<u8")
        values = self._feistel(places, keys)
        outside = np.flatnonzero(values >= self.rows)
        while outside.size:  # fewer than 4 walks on average, for the domain is smaller than 4 · rows
            values[outside] = self._feistel(values[outside], keys)
            outside = outside[values[outside] >= self.rows]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - bits))
        joined: np.ndarray = (left << bits) | right
        return joined


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
