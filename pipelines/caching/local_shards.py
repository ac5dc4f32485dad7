"""Shards of a cache on S3 or a slow disk, fetched onto a local disk ahead of their use: so many bytes at most, the longest unused go."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from pipelines.caching.latent_format import SHARDS
from pipelines.caching.shard_checks import compare_data, mapped
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.storage import PARTIAL

FETCHES_AT_ONCE = 4
SHARDS_HERE = "[0-9a-f]" * 16 + "/shard-*.arrow"  # what this module itself puts beside `folder`; the disk may hold other things


class LocalShards:
    """Files of the shards that a manifest names, below `folder`. Processes of one machine may share the folder: what lies there in the
    right length is used, whoever fetched it, and the time of last use is the file's own. `compare` reads a copy that was there before."""

    def __init__(self, cache: str, entries: list[dict[str, Any]], folder: str, limit: int) -> None:
        """`cache`: the folder or S3 prefix of the cache; `limit`: bytes. Raises UserError where no two shards fit."""
        self.cache, self.entries, self.folder, self.limit = cache, entries, Path(folder), limit
        largest = max((one["bytes"] for one in entries), default=1)
        self.capacity = max(1, limit // max(largest, 1))
        if self.capacity < 2 <= len(entries):
            raise UserError(f"cache.local_gb is {limit / 1e9:g}, expected room for two shards or more, of {largest / 1e9:g} GB each")
        storage.make_directory(folder)
        for left in self.folder.glob(f"*{PARTIAL}"):
            process = left.name.split(".")[-2]
            if not Path(f"/proc/{process}").exists():
                left.unlink(missing_ok=True)
        self._threads = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch")
        self._lock = Lock()
        self._fetching: dict[int, Future[str]] = {}
        self._compared = set[int]()  # by this process, when it fetched them or since

    def path(self, number: int) -> str:
        """The local file of a shard; waits until it is there. Raises UserError where the source's is not the manifest's."""
        return self._start(number).result()

    def ahead(self, numbers: Iterable[int]) -> None:
        """Begin to fetch these shards, in this order, as many as there is room for."""
        for number in list(numbers)[: self.capacity - 1]:
            self._start(number)

    def compare(self, number: int) -> None:
        """Compare the local file of a shard with the manifest, once, unless this process has fetched it; fetches it where it is not
        there. Raises UserError where it is damaged; then it is deleted."""
        path = Path(self.path(number))
        if number in self._compared:
            return
        entry = self.entries[number]
        try:
            found = storage.digest(mapped(str(path)))
        except FileNotFoundError:  # another process made room meanwhile, and who fetches it again compares it
            return
        if found != entry["sha256"]:
            path.unlink(missing_ok=True)
            raise UserError(
                f"the copy {path} is damaged (SHA-256 {found[:12]}…, the manifest says {entry['sha256'][:12]}…): it was deleted",
                remedy="run the same command again, which fetches it again",
            )
        self._compared.add(number)

    def _start(self, number: int) -> Future[str]:
        with self._lock:
            found = self._fetching.get(number)
            if found is None:
                found = self._fetching[number] = self._threads.submit(self._fetch, number)
                found.add_done_callback(lambda _: self._fetching.pop(number, None))
            return found

    def _fetch(self, number: int) -> str:
        entry = self.entries[number]
        target = self.folder / entry["name"]
        try:
            if target.stat().st_size == entry["bytes"]:
                os.utime(target)
                return str(target)
        except FileNotFoundError:
            pass
        data = storage.read_bytes(storage.join(self.cache, SHARDS, entry["name"]))
        compare_data(self.cache, entry, data)
        self._compared.add(number)
        with self._lock:
            self._make_room(len(data))
            partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
            partial.write_bytes(data)
            partial.replace(target)
        return str(target)

    def _make_room(self, needed: int) -> None:
        files = sorted(_known(self.folder.parent.glob(SHARDS_HERE)))  # of all caches that are kept here
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used + needed <= self.limit:
                return
            path.unlink(missing_ok=True)  # a reader that has it mapped keeps it until it lets go
            used -= size


def _known(files: Iterable[Path]) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, bytes and path; another process may delete a file meanwhile."""
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            yield stat.st_mtime_ns, stat.st_size, path
