"""Copies of a cache's shards from S3 or a slow disk on a local disk, fetched ahead of use, with a size limit and LRU eviction."""

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
SHARDS_HERE = "[0-9a-f]" * 16 + "/shard-*.arrow"  # the files that this module writes next to `folder`; other files are not touched


class LocalShards:
    """Local copies, in `folder`, of the shards in a manifest. Processes on one machine may share the folder: a copy of the right length is
    used, whichever process fetched it, and its modification time is the time of last use. `compare` verifies existing copies."""

    def __init__(self, cache: str, entries: list[dict[str, Any]], folder: str, limit: int) -> None:
        """`cache`: folder or S3 prefix of the cache; `limit`: bytes. Raises UserError if two shards do not fit."""
        self.cache, self.entries, self.folder, self.limit = cache, entries, Path(folder), limit
        largest = max((entry["bytes"] for entry in entries), default=1)
        self.capacity = max(1, limit // max(largest, 1))
        if self.capacity < 2 <= len(entries):
            raise UserError(
                f"cache.local_gb is {limit / 1e9:g}, expected at least {2 * largest / 1e9:g}: two shards of {largest / 1e9:g} GB"
            )
        storage.make_directory(folder)
        for unfinished in self.folder.glob(f"*{PARTIAL}"):
            process = unfinished.name.split(".")[-2]
            if not Path(f"/proc/{process}").exists():
                unfinished.unlink(missing_ok=True)
        self._threads = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch")
        self._lock = Lock()
        self._fetching: dict[int, Future[str]] = {}
        self._compared = set[int]()  # verified by this process

    def path(self, number: int) -> str:
        """The local file of a shard; waits until it is fetched. Raises UserError if the source does not match the manifest."""
        return self._start(number).result()

    def ahead(self, numbers: Iterable[int]) -> None:
        """Start fetching these shards, in this order, as many as fit."""
        for number in list(numbers)[: self.capacity - 1]:
            self._start(number)

    def compare(self, number: int) -> None:
        """Verify the local file of a shard against the manifest, unless this process has already done so; fetches it if it is missing.
        Raises UserError if it is damaged, and deletes it."""
        path = Path(self.path(number))
        if number in self._compared:
            return
        entry = self.entries[number]
        try:
            found = storage.digest(mapped(str(path)))
        except FileNotFoundError:  # another process has evicted it; it is verified when it is fetched again
            return
        if found != entry["sha256"]:
            path.unlink(missing_ok=True)
            raise UserError(
                f"the copy {path} is damaged and was deleted (SHA-256 {found[:12]}…, expected {entry['sha256'][:12]}…)",
                remedy="run the same command again to fetch it again",
            )
        self._compared.add(number)

    def _start(self, number: int) -> Future[str]:
        with self._lock:
            future = self._fetching.get(number)
            if future is None:
                future = self._fetching[number] = self._threads.submit(self._fetch, number)
                future.add_done_callback(lambda _: self._fetching.pop(number, None))
            return future

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
        files = sorted(_known(self.folder.parent.glob(SHARDS_HERE)))  # of all caches in this folder
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used + needed <= self.limit:
                return
            path.unlink(missing_ok=True)  # readers that have it mapped can still read it
            used -= size


def _known(files: Iterable[Path]) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, bytes and path; skips files that another process deletes in the meantime."""
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            yield stat.st_mtime_ns, stat.st_size, path
