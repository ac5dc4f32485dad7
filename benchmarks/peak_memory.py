"""The peak memory of a benchmark."""

import threading

import psutil


class PeakMemory:
    """The largest sum of the unique memory of this process and all it started, while the body runs; sampled four times a second."""

    def __enter__(self) -> "PeakMemory":
        self.gigabytes, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:
                    continue
            self.gigabytes = max(self.gigabytes, total / 1e9)
