"""Verification of a latent cache's shards against its manifest, and the mark of damaged shards."""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipelines.caching.latent_format import SHARDS
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

CONDEMNED = "condemned.json"
SHOWN = 10  # names in a message
REPAIR = "run `mar cache` with the same settings to make these shards again"


def condemn(path: str, names: Sequence[str]) -> None:
    """Mark these shards of the cache at `path` as damaged. Nothing reads the cache until the stage has made them again: their checksums
    differ from their records, and without its summary the cache is not finished."""
    storage.write_json(storage.join(path, CONDEMNED), {"format_version": 1, "shards": sorted({*condemned(path), *names})})
    storage.delete(storage.join(path, "summary.json"))


def condemned(path: str) -> list[str]:
    """Names of the shards marked as damaged."""
    mark = storage.join(path, CONDEMNED)
    return list(storage.read_json(mark)["shards"]) if storage.exists(mark) else []


def absolve(path: str) -> None:
    """Remove the mark: all shards match the manifest."""
    storage.delete(storage.join(path, CONDEMNED))


def refuse_condemned(path: str, shards: int) -> None:
    """Raise UserError if shards of the cache are marked as damaged."""
    names = condemned(path)
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(f"{len(names)} of the {shards} shards of {path} are damaged ({', '.join(names[:SHOWN])}{more})", remedy=REPAIR)


def compare(path: str, entry: dict[str, Any]) -> None:
    """Verify a shard of the cache at `path` against its entry in the manifest. Raises UserError if they differ."""
    file = storage.join(path, SHARDS, entry["name"])
    check_size(file, entry["bytes"])
    compare_data(path, entry, mapped(storage.filesystem(file)[1]))  # shards on S3 are read from local copies


def mapped(file: str) -> memoryview:
    """The bytes of a non-empty local file as a memory map: reading copies nothing and does not hold the GIL."""
    with pa.memory_map(file) as source:
        return memoryview(source.read_buffer())


def compare_data(path: str, entry: dict[str, Any], data: bytes | memoryview) -> None:
    """As `compare`, for bytes that were already read; the shard is marked as damaged before the error is raised."""
    found = storage.digest(data)
    if found == entry["sha256"]:
        return
    text = f"{entry['name']} of {path} is damaged: SHA-256 {found[:12]}…, expected {entry['sha256'][:12]}… as in the manifest"
    try:
        condemn(path, [entry["name"]])
    except (OSError, UserError) as error:
        raise UserError(
            f"{text}; the shard can't be marked as damaged ({error})",
            f"run `mar verify` on a machine that can write there, then {REPAIR}",
        ) from error
    raise UserError(text, remedy=f"{REPAIR}, then this command again")


def check_size(file: str, size: int) -> None:
    """Raise UserError unless the file exists and has this number of bytes."""
    found = storage.size(file) if storage.exists(file) else None
    if found != size:
        raise UserError(
            f"{file} {'is missing' if found is None else f'has {found} bytes'}, expected {size} bytes as in the manifest",
            remedy="run `mar cache` again to repair it",
        )


class ShardChecks:
    """Calls `check(number)` once for each shard, on a background thread. (Reading and SHA-256 release the GIL.) The thread starts with the
    first shard and does not keep the process alive."""

    def __init__(self, check: Callable[[int], None]) -> None:
        self.check = check
        self.begun: set[int] = set()
        self._waiting = queue.Queue[int]()
        self._failure: BaseException | None = None

    def begin(self, numbers: Iterable[int]) -> None:
        """Check these shards, unless they were checked before."""
        new = [number for number in numbers if number not in self.begun]
        if new and not self.begun:
            threading.Thread(target=self._work, name="shard-checks", daemon=True).start()
        self.begun.update(new)
        for number in new:
            self._waiting.put(number)

    def raise_found(self) -> None:
        """Raise the exception of a failed check, if any."""
        if self._failure is not None:
            raise self._failure

    def settle(self) -> None:
        """Wait for all started checks; raise the exception of a failed check."""
        self._waiting.join()
        self.raise_found()

    def _work(self) -> None:
        while True:
            number = self._waiting.get()
            try:
                if self._failure is None:
                    self.check(number)
            except BaseException as error:  # raised in the thread that reads the shards
                self._failure = error
            finally:
                self._waiting.task_done()
