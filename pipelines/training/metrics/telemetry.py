"""Telemetry of a training worker: throughput, waiting times and memory.

Shares of time in a row of metrics are the maximum over all workers; Prometheus gets the values of each worker.
"""

import time

import psutil
import torch
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from mar_model.config import MARConfig
from mar_model.flops import training_flops
from mar_model.training.gpus import of_device
from pipelines.training.metrics.prometheus import Gauges

GATHERED = ("data_wait_share", "communication_share", "checkpoint_share", "memory_gb", "gpu_memory_gb")


class ExposedCommunication:
    """The time that averaging the gradients adds to a step.

    DDP sends a bucket of gradients as soon as it is full, while the backward pass continues. The communication that is not hidden begins
    when the last bucket is full, because no computation is left then, and ends when the backward pass returns. On a GPU both times are
    events of the computing stream, read at the end of the interval.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._full: float | torch.cuda.Event | None = None
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.measured = isinstance(module, DistributedDataParallel)
        if isinstance(module, DistributedDataParallel):
            module.register_comm_hook(None, self._reduce)

    def _reduce(self, _: None, bucket: GradBucket) -> Future[torch.Tensor]:
        if bucket.is_last():
            self._full = self._now()
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: the default process group

    def ended(self) -> None:
        """Called when the backward pass that averages the gradients has returned."""
        if isinstance(self._full, float):
            self._seconds += time.perf_counter() - self._full
        elif self._full is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._pairs.append((self._full, end))
        self._full = None

    def seconds(self) -> float:
        """Exposed seconds since the last call. The device must have finished the last step."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1e3
        self._seconds, self._pairs = 0.0, []
        return seconds

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Telemetry:
    """One worker's metrics between two rows."""

    def __init__(
        self, config: MARConfig, micro_batch: int, module: nn.Module, device: torch.device, worker: int, workers: int, peak_tflops: float,
        run: str,
    ) -> None:  # fmt: skip
        """`peak_tflops`: peak of one worker's device, for the MFU; 0: from the data sheet of a known GPU."""
        self.config, self.micro_batch, self.device, self.worker, self.workers = config, micro_batch, device, worker, workers
        known = of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = (peak_tflops or (known.tflops if known else 0.0)) * 1e12
        self.communication = ExposedCommunication(module, device)
        self.gauges = Gauges(run, worker)
        self._process = psutil.Process()
        self._reset()

    def _reset(self) -> None:
        self._began, self._images, self._flops = time.perf_counter(), 0, 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def stepped(self, micro_batches: int, masked: int) -> None:
        """Called after a step: this worker has run its micro-batches, and the gradients are averaged."""
        self.communication.ended()
        self._images += micro_batches * self.micro_batch
        self._flops += micro_batches * training_flops(self.config, self.micro_batch, masked)

    def close(self, row: dict[str, float], seconds_waited: float, seconds_saving: float) -> dict[str, float]:
        """Add these metrics to the row and start a new interval. All workers must call it, after the device has finished its steps.
        `seconds_waited` for data and `seconds_saving` in checkpoints are this worker's."""
        seconds = time.perf_counter() - self._began
        memory = {"host": float(self._process.memory_info().rss)}
        if self.device.type == "cuda":
            memory["gpu"] = float(torch.cuda.max_memory_allocated(self.device))
        shares = {
            "data_wait_share": seconds_waited / seconds,
            "communication_share": self.communication.seconds() / seconds,
            "checkpoint_share": seconds_saving / seconds,
        }
        own = [*shares.values(), memory["host"] / 1e9, memory.get("gpu", 0.0) / 1e9]
        of_all = torch.zeros(self.workers, len(GATHERED) + 1, dtype=torch.float64, device=self.device)
        of_all[self.worker] = torch.tensor([*own, float(self._flops)], dtype=torch.float64)
        if self.workers > 1:
            torch.distributed.all_reduce(of_all)
        *most, _ = of_all.amax(dim=0).tolist()
        row = row | dict(zip(GATHERED, most, strict=True))
        if self.device.type != "cuda":
            del row["gpu_memory_gb"]
        if self.workers > 1 and not self.communication.measured:  # sharded models communicate throughout the step
            del row["communication_share"], shares["communication_share"]
        row["images_per_second_per_worker"] = row["images_per_second"] / self.workers
        flops = float(of_all[:, -1].sum()) / (seconds * self.workers)
        row["tflops_per_worker"] = flops / 1e12
        if self.peak:
            row["mfu"] = flops / self.peak
        self.gauges.of_worker(self._images, shares | {"worker_images_per_second": self._images / seconds}, memory)
        if self.worker == 0:
            self.gauges.of_run(row)
        self._reset()
        return row


def in_short(row: dict[str, float]) -> dict[str, float]:
    """The values shown next to the progress bar."""
    shown = {
        "loss": "loss",
        "mfu": "mfu",
        "data_wait_share": "data",
        "communication_share": "communication",
        "checkpoint_share": "checkpoints",
    }
    return {name: row[key] for key, name in shown.items() if key in row}
