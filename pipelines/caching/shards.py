"""The shards of a latent cache as work: which there are, which are finished, and a Ray Data pipeline that makes the others.

Whatever dies meanwhile, Ray starts an encoder again where there is room, and its calls with it; a shard is written whole or not at
all, and the same by whoever makes it, so that it does no harm when two do.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.caching.latent_format import SHARDS, shard_name
from pipelines.caching.records import finished_record, read_image_digests
from pipelines.caching.worker import CALLS_AT_ONCE, EncodingJob, Seconds, ShardEncoder, ShardProgress
from pipelines.images.reading import read_with_digest
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.cluster.channel import MessageChannel
from pipelines.runtime.cluster.workers import cluster_resources

CHECKS_AT_ONCE = 8  # threads that ask a file system about shards
READS_AT_ONCE = 16  # threads of one task that read images again
CHECKED_TOGETHER = 32  # finished shards compared with their checksums by one task
RESERVED = 0.5  # share of the cluster's CPUs that encoders reserve: those of a lost node fit on what is left


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


def finished(
    images: ImageSettings, path: str, rows: Any, shards: dict[int, Shard], say: Callable[[str], None] = lambda text: None
) -> dict[int, dict[str, Any]]:
    """Records of the shards that need not be made again: those whose file has the recorded size and checksum, and whose rejected
    images still have the bytes they were rejected for (else they were mended). `rows`: reference to ImageRows. `say` gets a line for
    each of the others that is there."""
    import ray

    there = set(storage.list_directory(storage.join(path, SHARDS)))
    begun = [one for one in shards.values() if {shard_name(one.index), one.record} <= there]
    parts = [begun[start : start + CHECKED_TOGETHER] for start in range(0, len(begun), CHECKED_TOGETHER)]
    task = ray.remote(num_cpus=_share(1), scheduling_strategy="SPREAD")(_finished_records)
    records = {index: record for found in ray.get([task.remote(images, path, rows, part) for part in parts]) for index, record in found}
    for one in begun:
        if one.index not in records:
            files = f"{storage.join(path, SHARDS, shard_name(one.index))} and {one.record}"
            say(f"{files} are made again: one of the two is damaged, or an image that was rejected has changed")
    return records


def _finished_records(images: ImageSettings, path: str, rows: ImageRows, shards: list[Shard]) -> list[tuple[int, dict[str, Any]]]:
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        found = pool.map(lambda one: (one.index, finished_record(images, path, rows, one.index, one.start)), shards)
        return [(index, record) for index, record in found if record is not None]


@dataclass
class Compared:
    """Rows whose images were read again: `changed` have other bytes, of `unknown` no digest is kept, `equal` counts the others."""

    equal: int = 0
    changed: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)


def compare_images(
    images: ImageSettings, path: str, rows: ImageRows, shards: dict[int, Shard], places: np.ndarray, done: Callable[[int], None]
) -> Compared:
    """Read the images of the rows `places` (sorted) again, on all nodes, and compare them with the digests in the records of their
    shards. Those of shards that are not finished yet are passed over. `done` is told how many rows are through."""
    import ray

    shared, through, whole = ray.put(rows), 0, Compared()
    task = ray.remote(num_cpus=_share(1), scheduling_strategy="SPREAD")(_compare_images)
    parts = [(one, places[np.searchsorted(places, one.start) : np.searchsorted(places, one.stop)].tolist()) for one in shards.values()]
    for reference, count in [
        (task.remote(images, path, shared, shard.index, shard.start, mine), len(mine)) for shard, mine in parts if mine
    ]:
        found: Compared = ray.get(reference)
        whole.equal += found.equal
        whole.changed += found.changed
        whole.unknown += found.unknown
        through += count
        done(through)
    return whole


def _compare_images(images: ImageSettings, path: str, rows: ImageRows, index: int, start: int, places: list[int]) -> Compared:
    digests = read_image_digests(path, index)
    if digests is None:
        return Compared()
    if not digests:
        return Compared(unknown=places)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = list(pool.map(lambda place: read_with_digest(images, rows[place])[1], places))
    changed = [place for place, digest in zip(places, found, strict=True) if digest != digests[place - start]]
    return Compared(len(places) - len(changed), changed)


def make(
    job: EncodingJob, encoders: int, rows: Any, shards: dict[int, Shard], begun: Callable[[int], None] = lambda images: None
) -> Iterator[tuple[int, dict[str, Any], Seconds]]:
    """Make these shards on a pool of encoders; yields index, record, and where the time went, of each when it is finished, in any order.

    `begun` is told from time to time, on a thread of its own, how many images of shards in work are done. `rows`: reference to ImageRows.
    """
    import ray.data

    if not shards:
        return
    channel = MessageChannel()
    in_work, finished = dict[int, int](), set[int]()

    def listen(message: ShardProgress) -> None:
        in_work[message.shard] = message.images
        begun(sum(images for index, images in list(in_work.items()) if index not in finished))

    work = [{"index": one.index, "start": one.start, "stop": one.stop} for _, one in sorted(shards.items())]
    records = ray.data.from_items(work, override_num_blocks=len(work)).map_batches(
        ShardEncoder,
        fn_constructor_args=(job, rows, channel),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(encoders, len(shards)),
            max_tasks_in_flight_per_actor=CALLS_AT_ONCE,
            max_concurrent_calls_per_actor=CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=_share(encoders),
        num_gpus=job.cluster.gpus_per_worker,
    )
    with channel.listening(listen):
        for block in records.iter_batches(batch_size=None, batch_format="numpy"):
            for index, record, seconds in zip(block["index"], block["record"], block["seconds"], strict=True):
                finished.add(int(index))
                yield int(index), json.loads(record), Seconds(*seconds)


def _share(encoders: int) -> float:
    """CPUs that each of so many actors reserves: one, or less where they would not fit the cluster together."""
    cpus, _ = cluster_resources()
    return min(1.0, int(100 * RESERVED * cpus / encoders) / 100) if cpus else 1.0
