"""The shards of a latent cache as work: which there are, which are finished, and encoders that make the others.

Whatever dies meanwhile, Ray starts an encoder again where there is room, and its calls with it; a shard is written whole or not at
all, and the same by whoever makes it, so that it does no harm when two do.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from pipelines import storage
from pipelines.cluster import cluster_resources
from pipelines.encoding import CALLS_AT_ONCE, EncodingJob, Seconds, ShardEncoder, finished_record
from pipelines.images import ImageSettings
from pipelines.latents import SHARDS, shard_name
from pipelines.sources.table import ImageRows

CHECKS_AT_ONCE = 8  # threads that ask a file system about shards
CHECKED_TOGETHER = 32  # finished shards compared with their checksums by one task
PROGRESS_SECONDS = 5.0
SILENT_SECONDS = 30.0  # an encoder that says nothing for so long has lost its place; others take its shards
RETRIES = 20  # of one shard whose encoder died; then it is the shard that kills them


@dataclass(frozen=True)
class Shard:
    """Rows start … stop − 1 of the sorted train rows."""

    index: int
    start: int
    stop: int

    @property
    def images(self) -> int:
        return self.stop - self.start

    @property
    def record(self) -> str:
        """Name of its record beside it."""
        return shard_name(self.index).removesuffix(".arrow") + ".json"


@dataclass(frozen=True)
class Progress:
    """A shard that was made now, or (without record) how far those in work are."""

    index: int = -1
    record: dict[str, Any] | None = None
    seconds: Seconds = field(default_factory=Seconds)
    begun: int = 0  # images done of shards in work


def shards_of(rows: int, size: int) -> dict[int, Shard]:
    """The shards of `size` rows each, the last with what is left."""
    return {start // size: Shard(start // size, start, min(start + size, rows)) for start in range(0, rows, size)}


def are_whole(path: str, entries: list[dict[str, Any]]) -> bool:
    """Whether every shard of a manifest is there, in the length it says."""

    def fits(entry: dict[str, Any]) -> bool:
        name = storage.join(path, SHARDS, entry["name"])
        return storage.exists(name) and storage.size(name) == entry["bytes"]

    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        return all(pool.map(fits, entries))


def finished(images: ImageSettings, path: str, rows: Any, shards: dict[int, Shard]) -> dict[int, dict[str, Any]]:
    """Records of the shards that need not be made again: those whose file has the recorded size and checksum, and whose rejected
    images still have the bytes they were rejected for (else they were mended). `rows`: reference to ImageRows."""
    import ray

    there = set(storage.list_directory(storage.join(path, SHARDS)))
    begun = [one for one in shards.values() if {shard_name(one.index), one.record} <= there]
    parts = [begun[start : start + CHECKED_TOGETHER] for start in range(0, len(begun), CHECKED_TOGETHER)]
    task = ray.remote(num_cpus=_share(1), scheduling_strategy="SPREAD")(_finished_records)
    return {index: record for found in ray.get([task.remote(images, path, rows, part) for part in parts]) for index, record in found}


def _finished_records(images: ImageSettings, path: str, rows: ImageRows, shards: list[Shard]) -> list[tuple[int, dict[str, Any]]]:
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        found = pool.map(lambda one: (one.index, finished_record(images, path, rows, one.index, one.start)), shards)
        return [(index, record) for index, record in found if record is not None]


def make(job: EncodingJob, encoders: int, rows: Any, shards: dict[int, Shard]) -> Iterator[Progress]:
    """Make these shards on as many encoders; yields each when it is finished, in any order, and in between how far they are."""
    import ray

    if not shards:
        return
    actor = ray.remote(
        num_cpus=_share(encoders),
        num_gpus=job.cluster.gpus_per_worker,
        max_restarts=-1,
        max_task_retries=RETRIES,
        max_concurrency=CALLS_AT_ONCE + 1,
        scheduling_strategy="SPREAD",
    )(ShardEncoder)
    actors = [actor.remote(job, rows) for _ in range(min(encoders, len(shards)))]
    try:
        yield from _Dispatch(actors, shards).run()
    finally:
        for one in actors:
            ray.kill(one)


def _share(encoders: int) -> float:
    """CPUs that each of so many actors reserves: one, or less where they would not fit the cluster together."""
    cpus, _ = cluster_resources()
    return min(1.0, int(100 * cpus / encoders) / 100) if cpus else 1.0


class _Dispatch:
    """Hands shards to encoders, each as many as it takes at a time."""

    def __init__(self, actors: list[Any], shards: dict[int, Shard]) -> None:
        self.actors, self.shards = actors, shards
        self.waiting = deque(sorted(shards))
        self.left = set(shards)
        self.calls: dict[Any, tuple[int, int]] = {}  # reference → (number of the actor, index of the shard)
        self.asked: dict[int, Any] = {}  # number of the actor → reference of its answer how far it is
        self.heard = [monotonic()] * len(actors)
        self.begun: list[dict[int, int]] = [{} for _ in actors]

    def run(self) -> Iterator[Progress]:
        import ray

        while self.left:
            self._hand_out()
            ready, _ = ray.wait(list(self.calls), timeout=PROGRESS_SECONDS)
            for reference in ready:
                number, index = self.calls.pop(reference)
                record, seconds = ray.get(reference)
                self.heard[number] = monotonic()
                if index in self.left:  # else another encoder was quicker
                    self.left.discard(index)
                    yield Progress(index, record, seconds, self._in_work())
            if not ready:
                self._ask()
                yield Progress(begun=self._in_work())

    def _hand_out(self) -> None:
        for number, actor in enumerate(self.actors):
            mine = [index for one, index in self.calls.values() if one == number]
            for index in [one for one in self.waiting if one in self.left and one not in mine][: CALLS_AT_ONCE - len(mine)]:
                self.waiting.remove(index)
                shard = self.shards[index]
                self.calls[actor.make.remote(index, shard.start, shard.stop)] = number, index

    def _ask(self) -> None:
        """Ask every encoder how far it is; give the shards of one that is silent to the others."""
        import ray

        for number, actor in enumerate(self.actors):
            reference = self.asked.get(number)
            if reference is None:
                self.asked[number] = actor.progress.remote()
            elif ray.wait([reference], timeout=0)[0]:
                del self.asked[number]
                self.heard[number] = monotonic()
                self.begun[number] = ray.get(reference)
            elif monotonic() - self.heard[number] > SILENT_SECONDS and len(self.actors) > 1:
                self.heard[number] = monotonic()
                held = [index for one, index in self.calls.values() if one == number]
                self.waiting.extend(index for index in held if index not in self.waiting)
                self.begun[number] = {}

    def _in_work(self) -> int:
        return sum(count for begun in self.begun for index, count in begun.items() if index in self.left)
