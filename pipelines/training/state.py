"""The state of a training worker, as stored in checkpoints: weights, averages, optimizer, progress and metrics intervals."""

import time
from collections import deque

import torch
from torch import Tensor

from mar_model.checkpoints.checkpoint import AVERAGE, OPTIMIZER, STATE, WEIGHTS, average_file, load_optimizer, optimizer_state
from mar_model.config import MARConfig
from mar_model.files import read_tensors
from mar_model.mar import MAR
from mar_model.training.ema import WeightAverage
from mar_model.training.recipe import initial_weights, parameter_groups
from mar_model.training.strategies import load_whole, strategy_of
from pipelines.checkpoints.directory import TrainingState
from pipelines.checkpoints.writer import CheckpointWriter, HostMemory
from pipelines.runtime import storage
from pipelines.runtime.records import nan_for_null, null_for_nan
from pipelines.training.job import TrainingJob
from pipelines.training.metrics.intervals import Interval
from pipelines.training.metrics.log import CHECKPOINTED
from pipelines.training.settings import TrainSettings


class WorkerState:
    """One worker's part of the state in a checkpoint."""

    def __init__(self, job: TrainingJob, newest: str | None, worker: int, workers: int, device: torch.device) -> None:
        """Load the checkpoint `newest`; without one, the weights of `job.start`, or random initial weights."""
        train = job.train
        self.train, self.worker = train, worker
        model = initial_model(job.model, train, job.seed).to(device)
        if job.start is not None and newest is None:
            model.load_state_dict(job.start.weights(model))
        self.model, self.strategy = model, strategy_of(train.strategy, model, workers, device, train.precision)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, train.weight_decay), lr=train.learning_rate, betas=(train.beta1, train.beta2), fused=True
        )
        self.averages = [WeightAverage(model, decay, train.ema_warmup) for decay in (train.ema_decay, *train.ema_decays)]
        self.images_seen = self.steps = 0  # steps without the skipped ones
        self.intervals: deque[dict[str, float]] = deque(maxlen=CHECKPOINTED)
        self.interval = Interval(device)
        self._memory = HostMemory()
        self.seconds_copying = 0.0
        if newest is not None:
            self._load(newest)

    def _load(self, checkpoint: str) -> None:
        directory = storage.local_directory(checkpoint)
        state = storage.read_json(storage.join(checkpoint, STATE), TrainingState)
        load_whole(self.strategy, self.model.state_dict(), read_tensors(directory / WEIGHTS))
        for file, average in zip(self._average_files(), self.averages, strict=True):
            load_whole(self.strategy, average.weights, read_tensors(directory / file))
        load_optimizer(directory, self.model, self.optimizer, self.strategy.place)
        self.images_seen, self.steps = state["images_seen"], state["step"]
        self.intervals.extend(map(nan_for_null, state["intervals"]))
        self.interval.go_on(state["interval"], self.worker)

    def progress(self, images_seen: int, sums: list[float]) -> dict[str, object]:
        """The variable part of `state.json`; `sums` are the interval's sums over all workers."""
        lines = [null_for_nan(line) for line in self.intervals if line["images_seen"] <= images_seen]
        return {"images_seen": images_seen, "step": self.steps, "intervals": lines, "interval": sums}

    def copies(self, writer: CheckpointWriter | None) -> dict[str, dict[str, Tensor]]:
        """file → name → full tensor in host memory, on rank 0, which has a writer; sharded models are gathered from all workers."""
        if self.worker > 0 and not self.strategy.sharded:
            return {}
        began = time.perf_counter()
        files = {
            WEIGHTS: dict(self.model.state_dict()),
            **{file: average.weights for file, average in zip(self._average_files(), self.averages, strict=True)},
            OPTIMIZER: optimizer_state(self.model, self.optimizer),
        }
        if writer is not None:
            writer.wait()  # it may still read from the same memory
        copies: dict[str, dict[str, Tensor]] = {file: {} for file in files}
        for file, tensors in files.items():
            for name, tensor in tensors.items():
                whole = self.strategy.whole(tensor.detach())
                if writer is not None:
                    copies[file][name] = self._memory.copy(f"{file} {name}", whole)
        self._memory.arrived()
        self.seconds_copying += time.perf_counter() - began
        return copies

    def _average_files(self) -> list[str]:
        return [AVERAGE, *(average_file(decay) for decay in self.train.ema_decays)]


def initial_model(config: MARConfig, train: TrainSettings, seed: int) -> MAR:
    """The model with random initial weights, the same on every worker, compiled and with activation checkpointing as set in `train`."""
    with torch.random.fork_rng():
        torch.manual_seed(initial_weights(seed))
        model = MAR(config)
    if train.compile:
        model.compile_blocks()
    if train.activation_checkpointing:
        model.recompute_activations()
    return model
