"""Metrics of a training run for Prometheus, through Ray: the agent of each node exports them with the prefix `ray_`.

Ray drops a gauge that is not set for two of its reports (10 s each), but rows of metrics are less frequent. A thread sets the last
values again until the process ends or calls `close`. NaN is not exported: the series has a gap.
"""

import threading
from collections.abc import Mapping
from typing import Any

PREFIX = "mar_train_"
OF_RUN = {  # one value per run, from rank 0; Ray accepts only ASCII in descriptions
    "images_seen": "images seen by the run",
    "loss": "training loss over the last interval",
    "gradient_norm": "mean norm of the gradient before clipping",
    "skipped_share": "share of steps in the last interval that were skipped for a non-finite loss or gradient",
    "learning_rate": "learning rate of the last step",
    "images_per_second": "images per second of all workers",
    "tflops_per_worker": "floating-point operations of the steps, 10^12 per second and worker",
    "mfu": "model FLOP utilisation: share of the devices' peak performance",
}
OF_WORKER = {
    "worker_images_per_second": "images per second of one worker",
    "data_wait_share": "share of time spent waiting for data",
    "communication_share": "share of time that the all-reduce of gradients adds to the steps",
    "checkpoint_share": "share of time during which checkpoints block the steps",
    "memory_bytes": "memory of the worker: host (resident), gpu (peak allocated)",
}
AGAIN_SECONDS = 1.0
LOSS_BAND, IMAGES, VALIDATION = "loss_band", "images", "validation_frechet_distance"


def exported() -> set[str]:
    """All exported names."""
    gauges = {f"ray_{PREFIX}{name}" for name in (*OF_RUN, *OF_WORKER, LOSS_BAND, VALIDATION)}
    return gauges | {f"ray_{PREFIX}{IMAGES}_total"}


class Gauges:
    """Gauges of one process for the run `run`: a training worker, or the driver for validations."""

    def __init__(self, run: str, worker: int | None = None) -> None:
        from ray.util.metrics import Counter, Gauge

        names = {**OF_RUN, LOSS_BAND: "noise-prediction error by noise level", **OF_WORKER, VALIDATION: "Frechet distance while training"}
        labels = {LOSS_BAND: ("band",), VALIDATION: ("metric",), "memory_bytes": ("worker", "kind")}
        self._labels = {"run": run, **({} if worker is None else {"worker": str(worker)})}
        self._gauges = {
            name: Gauge(PREFIX + name, help, tag_keys=("run", *labels.get(name, ("worker",) if name in OF_WORKER else ())))
            for name, help in names.items()
        }
        self._images = Counter(PREFIX + IMAGES, "images trained on, including repeated steps", tag_keys=("run", "worker"))
        self._last: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._set_again, name="prometheus", daemon=True).start()

    def close(self) -> None:
        """Stop setting values; Ray then drops the gauges."""
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
        """Set the run's gauges from a row of metrics, on rank 0."""
        run = {"run": self._labels["run"]}
        for name in OF_RUN.keys() & row.keys():
            self._set(name, row[name], run)
        for name in row:
            if name.startswith(f"{LOSS_BAND}_"):
                self._set(LOSS_BAND, row[name], run | {"band": name.rpartition("_")[2]})

    def of_worker(self, images: int, figures: Mapping[str, float], memory: Mapping[str, float]) -> None:
        """Set a worker's gauges: images since the last call, metrics of `OF_WORKER`, and bytes by kind of memory."""
        if images:
            self._images.inc(images, self._labels)
        for name, value in figures.items():
            self._set(name, value, self._labels)
        for kind, value in memory.items():
            self._set("memory_bytes", value, self._labels | {"kind": kind})

    def of_validation(self, metrics: Mapping[str, Any]) -> None:
        """Set the gauges of a validation: distance by metric name."""
        for name, value in metrics.items():
            self._set(VALIDATION, value, {"run": self._labels["run"], "metric": name})


def run_label(train_path: str) -> str:
    """The last two parts of a run's directory, which identify the run on a dashboard."""
    return "/".join(train_path.rstrip("/").split("/")[-2:])
