"""The sockets of a tree of processes that wait for others to connect, as Linux lists them in /proc/net."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import psutil

LISTENING, UNCONNECTED = "0A", "07"
TABLES = {"tcp": LISTENING, "tcp6": LISTENING, "udp": UNCONNECTED, "udp6": UNCONNECTED}


def listening(root: int) -> set[tuple[str, str, int]]:
    """(name of the process, IP address, port) of each socket in process `root` and below that anybody could connect to or send to."""
    there = {}
    for table, state in TABLES.items():
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, found, *others = line.split()
            if found == state:
                there[others[5]] = _address(local)
    sockets = set()
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            for file in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    inode = os.readlink(file).removeprefix("socket:[").removesuffix("]")
                    if inode in there:
                        sockets.add((process.name(), *there[inode]))
    return sockets


def _address(text: str) -> tuple[str, int]:
    """ "0100007F:1F90" → ("127.0.0.1", 8080); the kernel prints each four bytes of an address as one number of this machine."""
    address, _, port = text.partition(":")
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed).removeprefix("::ffff:"), int(port, 16)


@contextlib.contextmanager
def recorded(root: int) -> Iterator[set[tuple[str, str, int]]]:
    """`listening(root)`, looked up again and again while the body runs."""
    found, ended = set[tuple[str, str, int]](), Event()

    def look() -> None:
        while not ended.wait(0.1):
            found.update(listening(root))

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
