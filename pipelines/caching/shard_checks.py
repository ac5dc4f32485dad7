"""Whether the shards of a latent cache are what its manifest says: the mark of those that are not, and the comparison itself."""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipelines.caching.latent_format import SHARDS
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

CONDEMNED = "condemned.json"
SHOWN = 10  # names in one message
REPAIR = "run `mar cache` with the same settings, which makes exactly these shards again"


def condemn(path: str, names: Sequence[str]) -> None:
    """Mark these shards of the cache at `path` as damaged: nothing reads the cache until the next run of the stage has made them again,
    for their checksums are not those of their records, and without its summary the cache is not finished."""
    storage.write_json(storage.join(path, CONDEMNED), {"format_version": 1, "shards": sorted({*condemned(path), *names})})
    storage.delete(storage.join(path, "summary.json"))


def condemned(path: str) -> list[str]:
    """Names of the shards that are marked as damaged."""
    mark = storage.join(path, CONDEMNED)
    return list(storage.read_json(mark)["shards"]) if storage.exists(mark) else []


def absolve(path: str) -> None:
    """Remove the mark: every shard is what the manifest says."""
    storage.delete(storage.join(path, CONDEMNED))


def refuse_condemned(path: str, shards: int) -> None:
    """Raise UserError where some of the cache's shards are marked as damaged."""
    names = condemned(path)
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(f"{len(names)} of the {shards} shards of {path} are damaged ({', '.join(names[:SHOWN])}{more}): {REPAIR}")


def compare(path: str, entry: dict[str, Any]) -> None:
    """Read a shard of the cache at `path` and compare it with its entry in the manifest. Raises UserError where it is another one."""
    file = storage.join(path, SHARDS, entry["name"])
    check_size(file, entry["bytes"])
    compare_data(path, entry, mapped(storage.filesystem(file)[1]))  # only copies of what is on S3 are opened


def mapped(file: str) -> memoryview:
    """The bytes of a local file that is not empty, as a memory map: to read them copies nothing, and holds no lock."""
    with pa.memory_map(file) as source:
        return memoryview(source.read_buffer())


def compare_data(path: str, entry: dict[str, Any], data: bytes | memoryview) -> None:
    """As `compare`, of bytes that were read from the cache at `path`; the shard is marked as damaged before the error is raised."""
    found = storage.digest(data)
    if found == entry["sha256"]:
        return
    text = f"{entry['name']} of {path} has the SHA-256 {found[:12]}…, the manifest says {entry['sha256'][:12]}…"
    try:
        condemn(path, [entry["name"]])
    except (OSError, UserError) as error:
        raise UserError(
            f"{text}; the shard can't be marked as damaged ({error})", f"run `mar verify` where that is possible, then {REPAIR}"
        ) from error
    raise UserError(f"{text}: it is damaged", remedy=f"{REPAIR}, then this command again")


def check_size(file: str, size: int) -> None:
    """Raise UserError unless the file is there and has this many bytes."""
    found = storage.size(file) if storage.exists(file) else None
    if found != size:
        raise UserError(
            f"{file} is {'missing' if found is None else f'{found} bytes long'}, the manifest says {size} bytes: "
            "run `mar cache` again to repair it"
        )


class ShardChecks:
    """Runs `check(number)` once for each shard, on a thread beside the work that reads them. (SHA-256 and reading release the
    interpreter lock.) The thread begins with the first shard and does not keep the process alive."""

    def __init__(self, check: Callable[[int], None]) -> None:
        self.check = check
        self.begun: set[int] = set()
        self._waiting = queue.Queue[int]()
        self._failure: BaseException | None = None

    def begin(self, numbers: Iterable[int]) -> None:
        """Have these shards checked, those that are not yet."""
        new = [number for number in numbers if number not in self.begun]
        if new and not self.begun:
            threading.Thread(target=self._work, name="shard-checks", daemon=True).start()
        self.begun.update(new)
        for number in new:
            self._waiting.put(number)

    def raise_found(self) -> None:
        """Raise what a check has raised so far."""
        if self._failure is not None:
            raise self._failure

    def settle(self) -> None:
        """Wait until all that has begun is checked; raise what a check has raised."""
        self._waiting.join()
        self.raise_found()

    def _work(self) -> None:
        while True:
            number = self._waiting.get()
            try:
                if self._failure is None:
                    self.check(number)
            except BaseException as error:  # raised where the shards are read
                self._failure = error
            finally:
                self._waiting.task_done()
