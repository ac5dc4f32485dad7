"""Numbers of a training run for Prometheus, through Ray: each node's agent exports them under these names with `ray_` before them.

Ray forgets a gauge that is not set again within two of its reports (10 s each), and lines of metrics are further apart: what was set
last is set again and again, until the process ends or says no more. A gauge of NaN is not exported: its series has a gap.
"""

import threading
from collections.abc import Mapping
from typing import Any

PREFIX = "mar_train_"
OF_RUN = {  # from the first worker, one for the run; Ray takes descriptions in ASCII alone
    "images_seen": "images that the run has seen",
    "loss": "training loss over the last interval",
    "gradient_norm": "mean norm of the gradient before clipping",
    "skipped_share": "share of the last interval's steps that were skipped, because a loss or gradient was not finite",
    "learning_rate": "learning rate of the last step",
    "images_per_second": "images a second of all workers together",
    "tflops_per_worker": "arithmetic of the steps, 10^12 operations a second and worker",
    "mfu": "model FLOP utilisation: share of the devices' peak",
}
OF_WORKER = {
    "worker_images_per_second": "images a second of one worker",
    "data_wait_share": "share of the time waiting for data",
    "communication_share": "share of the time that the gradients' all-reduce adds to the steps",
    "checkpoint_share": "share of the time in which checkpoints stop the steps",
    "memory_bytes": "memory of the worker: host (resident), gpu (peak allocated)",
}
AGAIN_SECONDS = 1.0
LOSS_BAND, IMAGES, VALIDATION = "loss_band", "images", "validation_frechet_distance"


def exported() -> set[str]:
    """Every name as Prometheus sees it."""
    gauges = {f"ray_{PREFIX}{name}" for name in (*OF_RUN, *OF_WORKER, LOSS_BAND, VALIDATION)}
    return gauges | {f"ray_{PREFIX}{IMAGES}_total"}


class Gauges:
    """What one process tells of the run called `run`: a worker of training, or the driver of its validations."""

    def __init__(self, run: str, worker: int | None = None) -> None:
        from ray.util.metrics import Counter, Gauge

        names = {**OF_RUN, LOSS_BAND: "noise-prediction error by noise level", **OF_WORKER, VALIDATION: "Frechet distance while training"}
        labels = {LOSS_BAND: ("band",), VALIDATION: ("metric",), "memory_bytes": ("worker", "kind")}
        self._labels = {"run": run, **({} if worker is None else {"worker": str(worker)})}
        self._gauges = {
            name: Gauge(PREFIX + name, help, tag_keys=("run", *labels.get(name, ("worker",) if name in OF_WORKER else ())))
            for name, help in names.items()
        }
        self._images = Counter(PREFIX + IMAGES, "images trained on, those of lost and repeated steps included", tag_keys=("run", "worker"))
        self._last: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._set_again, name="prometheus", daemon=True).start()

    def close(self) -> None:
        """Say no more: Ray forgets the gauges."""
        self._closed.set()

    def _set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        with self._lock:
            self._last[name, frozenset(labels.items())] = value
            self._gauges[name].set(value, dict(labels))

    def _set_again(self) -> None:
        while not self._closed.wait(AGAIN_SECONDS):
            with self._lock:
                for (name, labels), value in self._last.items():
                    self._gauges[name].set(value, dict(labels))

    def of_run(self, row: Mapping[str, float]) -> None:
        """A line of metrics, from the first worker."""
        run = {"run": self._labels["run"]}
        for name in OF_RUN.keys() & row.keys():
            self._set(name, row[name], run)
        for name in row:
            if name.startswith(f"{LOSS_BAND}_"):
                self._set(LOSS_BAND, row[name], run | {"band": name.rpartition("_")[2]})

    def of_worker(self, images: int, figures: Mapping[str, float], memory: Mapping[str, float]) -> None:
        """A worker's own: images since the last call, figures of `OF_WORKER`, and bytes by kind of memory."""
        if images:
            self._images.inc(images, self._labels)
        for name, value in figures.items():
            self._set(name, value, self._labels)
        for kind, value in memory.items():
            self._set("memory_bytes", value, self._labels | {"kind": kind})

    def of_validation(self, metrics: Mapping[str, Any]) -> None:
        """What a validation measured: distance by the name of its metric."""
        for name, value in metrics.items():
            self._set(VALIDATION, value, {"run": self._labels["run"], "metric": name})


def run_label(train_path: str) -> str:
    """The last two parts of a run's directory: what tells runs apart on a dashboard."""
    return "/".join(train_path.rstrip("/").split("/")[-2:])
