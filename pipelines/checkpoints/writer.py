"""Checkpoints written while training goes on: the step waits for a copy in host memory, a thread does the rest."""

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

ATTEMPTS = 3  # at the checkpoint that ends a run, which nothing comes after
PAUSE_SECONDS = 5.0
NICENESS = 10  # of the writing thread: it takes what the training thread leaves


class HostMemory:
    """Where copies of tensors go; kept from one checkpoint to the next, for pinned memory beside a GPU takes seconds to get."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` in this memory. From a GPU the copy is under way when this returns: see `arrived`."""
        if name not in self._buffers:
            pinned = tensor.device.type == "cuda"
            self._buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned, memory_format=torch.contiguous_format)
        return self._buffers[name].copy_(tensor, non_blocking=True)

    @staticmethod
    def arrived() -> None:
        """Wait until all copies are whole."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class CheckpointWriter:
    """Writes one checkpoint at a time on a thread of its own; the next waits for the one before.

    One that can't be written (disk full, bucket out of reach) is told to `say`, and training goes on: the next is tried as usual.
    """

    def __init__(self, run: CheckpointedRun, say: Callable[[str], None], images_seen: int) -> None:
        """For a run that goes on from the checkpoint at `images_seen`: the later ones on disk are damaged."""
        self.run, self.say = run, say
        self.newest = -1  # images seen by the newest that is written
        self.written: deque[str] = deque()  # paths that nobody has asked for yet
        self._damaged = {name for name in checkpoint_names(run.path) if images_of(name) > images_seen}
        self._scores = Scores(run.path, run.retention.best_metric, run.retention.validated_as)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_step_back)
        self._writing: Future[None] | None = None
        self._failed: OSError | None = None

    def wait(self) -> None:
        """Until the checkpoint under way, if any, is written or has failed; then its tensors may change."""
        if self._writing is not None:
            self._writing.result()

    def begin(self, tensors: Mapping[str, dict[str, Tensor]], progress: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of `tensors` (file → name → values), which must not change before `wait` returns.

        `progress`: the fields of `state.json` that training resumes from: `images_seen`, `step`, and `intervals`, the newest lines of
        metrics.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, tensors, {**progress, **self.run.about})

    def finish(self, tensors: Mapping[str, dict[str, Tensor]], progress: Mapping[str, Any]) -> None:
        """Write the checkpoint that ends a run. Raises UserError when several attempts failed."""
        for attempt in range(ATTEMPTS):
            self.begin(tensors, progress)
            self.wait()
            if self._failed is None:
                return
            if attempt < ATTEMPTS - 1:
                time.sleep(PAUSE_SECONDS)
        raise UserError(f"the last checkpoint can't be written, in {ATTEMPTS} attempts: {self._failed}", remedy="mend that and run again")

    def close(self) -> None:
        self._thread.shutdown()

    def _write(self, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            path = publish_checkpoint(self.run.path, self.run.model, tensors, state)
        except OSError as error:
            self._failed = error
            self.say(f"checkpoint at {state['images_seen']:,} images failed, training goes on without it: {error}")
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
    with contextlib.suppress(OSError, AttributeError):  # Linux alone knows the niceness of a thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
