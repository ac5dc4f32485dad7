"""The shards of a latent cache as units of work: all shards, the finished ones, and a Ray Data pipeline that makes the rest.

After a node or worker failure Ray restarts the encoder where resources are available, and repeats its calls. Shards are written atomically
and deterministically, so that it does no harm if two encoders make the same shard.
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

CHECKS_AT_ONCE = 8  # threads for file system requests
READS_AT_ONCE = 16  # threads per task that reads images again
CHECKED_TOGETHER = 32  # finished shards verified per task
RESERVED = 0.5  # share of the cluster's CPUs that encoders reserve: after a node failure they still fit


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
        """File name of its record."""
        return shard_name(self.index).removesuffix(".arrow") + ".json"


def shards_of(rows: int, size: int) -> dict[int, Shard]:
    """Divide the rows into shards of `size` rows; the last may be smaller."""
    return {start // size: Shard(start // size, start, min(start + size, rows)) for start in range(0, rows, size)}


def are_whole(path: str, entries: list[dict[str, Any]]) -> bool:
    """Whether all shards of a manifest exist with the recorded length."""

    def fits(entry: dict[str, Any]) -> bool:
        name = storage.join(path, SHARDS, entry["name"])
        return storage.exists(name) and storage.size(name) == entry["bytes"]

    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        return all(pool.map(fits, entries))


def finished(
    images: ImageSettings, path: str, rows: Any, shards: dict[int, Shard], say: Callable[[str], None] = lambda text: None
) -> dict[int, dict[str, Any]]:
    """Records of the finished shards: the file has the recorded size and checksum, and the rejected images still have the same bytes (else
    they were repaired). `rows`: reference to ImageRows. `say` prints a line for each existing shard that is not finished."""
    import ray

    names = set(storage.list_directory(storage.join(path, SHARDS)))
    begun = [shard for shard in shards.values() if {shard_name(shard.index), shard.record} <= names]
    parts = [begun[start : start + CHECKED_TOGETHER] for start in range(0, len(begun), CHECKED_TOGETHER)]
    task = ray.remote(num_cpus=_share(1), scheduling_strategy="SPREAD")(_finished_records)
    records = {index: record for found in ray.get([task.remote(images, path, rows, part) for part in parts]) for index, record in found}
    for shard in begun:
        if shard.index not in records:
            files = f"{storage.join(path, SHARDS, shard_name(shard.index))} and {shard.record}"
            say(f"{files} are made again: one of the files is damaged, or a rejected image has changed")
    return records


def _finished_records(images: ImageSettings, path: str, rows: ImageRows, shards: list[Shard]) -> list[tuple[int, dict[str, Any]]]:
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        found = pool.map(lambda shard: (shard.index, finished_record(images, path, rows, shard.index, shard.start)), shards)
        return [(index, record) for index, record in found if record is not None]


@dataclass
class Compared:
    """Rows whose images were read again: `changed` have other bytes, `unknown` have no recorded digest, `equal` counts the unchanged."""

    equal: int = 0
    changed: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)


def compare_images(
    images: ImageSettings, path: str, rows: ImageRows, shards: dict[int, Shard], places: np.ndarray, done: Callable[[int], None]
) -> Compared:
    """Read the images of the rows `places` (sorted) again, on all nodes, and compare them with the digests in the shards' records. Rows of
    unfinished shards are skipped. Calls `done` with the number of finished rows."""
    import ray

    shared, through, total = ray.put(rows), 0, Compared()
    task = ray.remote(num_cpus=_share(1), scheduling_strategy="SPREAD")(_compare_images)
    parts = [
        (shard, places[np.searchsorted(places, shard.start) : np.searchsorted(places, shard.stop)].tolist()) for shard in shards.values()
    ]
    for reference, count in [
        (task.remote(images, path, shared, shard.index, shard.start, inside), len(inside)) for shard, inside in parts if inside
    ]:
        found: Compared = ray.get(reference)
        total.equal += found.equal
        total.changed += found.changed
        total.unknown += found.unknown
        through += count
        done(through)
    return total


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
    """Make these shards on a pool of encoders. Yields index, record and timings of each shard when it is finished, in any order.

    `begun` is called regularly, on a separate thread, with the number of images done in unfinished shards. `rows`: reference to ImageRows.
    """
    import ray.data

    if not shards:
        return
    channel = MessageChannel()
    in_work, finished = dict[int, int](), set[int]()

    def listen(message: ShardProgress) -> None:
        in_work[message.shard] = message.images
        begun(sum(images for index, images in list(in_work.items()) if index not in finished))

    work = [{"index": shard.index, "start": shard.start, "stop": shard.stop} for _, shard in sorted(shards.items())]
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
    """CPUs that each encoder reserves: 1, or less if that many would not fit in the cluster."""
    cpus, _ = cluster_resources()
    return min(1.0, int(100 * RESERVED * cpus / encoders) / 100) if cpus else 1.0
