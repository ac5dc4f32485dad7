"""Asynchronous checkpoints: training waits only for a copy to host memory; a background thread writes the files."""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pipelines.checkpoints.directory import checkpoint_names, images_of, publish_checkpoint
from pipelines.checkpoints.retention import Scores, drop_old_checkpoints
from pipelines.checkpoints.run import CheckpointedRun
from pipelines.runtime.errors import UserError

ATTEMPTS = 3  # for the last checkpoint of a run
PAUSE_SECONDS = 5.0
NICENESS = 10  # of the writing thread, so that the training thread has priority


class HostMemory:
    """Host memory for copies of tensors, reused for every checkpoint, because allocating pinned memory takes seconds."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy `tensor` to this memory. A copy from a GPU is asynchronous: see `arrived`."""
        if name not in self._buffers:
            pinned = tensor.device.type == "cuda"
            self._buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned, memory_format=torch.contiguous_format)
        return self._buffers[name].copy_(tensor, non_blocking=True)

    @staticmethod
    def arrived() -> None:
        """Wait until all copies are complete."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class CheckpointWriter:
    """Writes one checkpoint at a time on a background thread; a new checkpoint waits for the previous one.

    If a checkpoint cannot be written (disk full, bucket unreachable), `say` prints the error, and training continues to the next one.
    """

    def __init__(self, run: CheckpointedRun, say: Callable[[str], None], images_seen: int) -> None:
        """For a run that resumes from the checkpoint at `images_seen`: later checkpoints on disk are damaged."""
        self.run, self.say = run, say
        self.newest = -1  # images seen by the newest written checkpoint
        self.written: deque[str] = deque()  # paths that have not been read yet
        self._damaged = {name for name in checkpoint_names(run.path) if images_of(name) > images_seen}
        self._scores = Scores(run.path, run.retention.best_metric, run.retention.validated_as)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_step_back)
        self._writing: Future[None] | None = None
        self._failed: OSError | None = None

    def wait(self) -> None:
        """Wait until the current checkpoint, if any, is written or has failed; after that its tensors may change."""
        if self._writing is not None:
            self._writing.result()

    def begin(self, tensors: Mapping[str, dict[str, Tensor]], progress: Mapping[str, Any]) -> None:
        """Start writing a checkpoint of `tensors` (file → name → values), which must not change before `wait` returns.

        `progress`: the fields of `state.json` that training resumes from: `images_seen`, `step`, and `intervals`, the last rows of metrics.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, tensors, {**progress, **self.run.about})

    def finish(self, tensors: Mapping[str, dict[str, Tensor]], progress: Mapping[str, Any]) -> None:
        """Write the last checkpoint of a run. Raises UserError when all attempts have failed."""
        for attempt in range(ATTEMPTS):
            self.begin(tensors, progress)
            self.wait()
            if self._failed is None:
                return
            if attempt < ATTEMPTS - 1:
                time.sleep(PAUSE_SECONDS)
        raise UserError(
            f"the last checkpoint can't be written, in {ATTEMPTS} attempts: {self._failed}",
            remedy="fix that and run the same command again",
        )

    def close(self) -> None:
        self._thread.shutdown()

    def _write(self, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            path = publish_checkpoint(self.run.path, self.run.model, tensors, state)
        except OSError as error:
            self._failed = error
            self.say(f"checkpoint at {state['images_seen']:,} images could not be written, training continues: {error}")
            return
        self._failed, self.newest = None, state["images_seen"]
        self._damaged.discard(path.rpartition("/")[2])
        try:
            self._scores.refresh()
            drop_old_checkpoints(path, self.run.retention.kept, self.run.retention.every_images, self._scores, self._damaged)
        except OSError as error:
            self.say(f"older checkpoints could not be deleted: {error}")
        self.written.append(path)


def _step_back() -> None:
    with contextlib.suppress(OSError, AttributeError):  # only Linux has a niceness per thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
