"""A training run of 50 steps on two workers, what happens to it while it is under way, and whether it ended as if nothing had."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from pipelines.checkpoints.directory import checkpoint_path
from pipelines.training.settings import TrainSettings

STEPS, BATCH = 50, 16
RECIPE = TrainSettings(
    images=STEPS * BATCH, batch=BATCH, micro_batch=4, learning_rate=1e-3, warmup_images=32, ema_decay=0.99, ema_decays=[0.9], workers=2,
    precision="float32", checkpoint_images=160, checkpoints_kept=2, log_images=160, failures=2, hang_seconds=60,
)  # fmt: skip
FILES = ("model.safetensors", "ema.safetensors", "ema-0.9.safetensors", "optimizer.safetensors")


def tensors(run: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(Path(checkpoint_path(str(run), STEPS * BATCH)) / file)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_bitwise(run: Path, expected: Path) -> None:
    for file in FILES:
        found, wanted = tensors(run, file), tensors(expected, file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found), file
    np.testing.assert_allclose(losses(run), losses(expected), rtol=1e-12)  # an interval may have been left in its midst


def workers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(one.cmdline())]


@contextlib.contextmanager
def meanwhile(run: Path, events: list[tuple[int, Callable[[], None]]]) -> Iterator[None]:
    """Each event happens as soon as the run has the checkpoint at so many images."""

    def act() -> None:
        for images, event in events:
            while not Path(checkpoint_path(str(run), images)).exists():
                time.sleep(0.005)
            event()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield
    thread.join(timeout=30)
    assert not thread.is_alive(), "the run never got there"


def signalled(kind: signal.Signals) -> Callable[[], None]:
    """An event: a worker gets this signal."""
    return lambda: workers()[-1].send_signal(kind)
