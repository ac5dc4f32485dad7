"""Tokenizer training with failed and hung workers, a killed command and Ctrl-C: it ends as if nothing had happened."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from disturbed_run import signalled
from listening import Listening
from PIL import Image
from safetensors.torch import load_file

from jobs.config.load import load
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import DamagedFileError
from pipelines.tokenizing.learning.progress import read_progress
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.tokenizing.stage import tokenize

SETTINGS = TokenizerSettings(
    kind="vq", codes=32, channels=4, width=8, multipliers=[1, 2, 2], encoder_blocks=1, decoder_blocks=1, attention=False, images=800,
    batch=16, micro_batch=4, learning_rate=1e-3, precision="float32", checkpoint_images=160, workers=2, ema_decay=0.9, l1_weight=1.0,
    revive_images=64, adversarial_weight=0.5, adversarial_start=200, discriminator_width=8, discriminator_layers=2, failures=3,
    validation_images=320,
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSettings:
    source = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for index in range(48):
        folder = source / ("held_out" if index >= 40 else "train") / "a"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize((16, 16)).save(folder / f"{index:02d}.png")
    return ImageSettings(source=str(source), size=16, held_out_folder="held_out")


@pytest.fixture(scope="module")
def undisturbed(images: ImageSettings, ray_local: ClusterSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    tokenize(Images(images), replace(SETTINGS, path=str(path)), Listening(ray_local))
    return path


@contextlib.contextmanager
def meanwhile(path: Path, events: list[tuple[int, Callable[[], None]]]) -> Iterator[None]:
    """Each event happens as soon as the run has saved so many images."""

    def act() -> None:
        for images, event in events:
            while seen(path) < images:
                time.sleep(0.01)
            event()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield
    thread.join(timeout=30)


def seen(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError, DamagedFileError):
        progress = read_progress(str(path))
        return progress.images_seen if progress else 0
    return 0


def assert_the_same(path: Path, expected: Path) -> None:
    found, wanted = (load_file(one / "tokenizer.safetensors") for one in (path, expected))
    assert all(found[name].equal(wanted[name]) for name in wanted)
    first, second = (load_summary(one) for one in (path, expected))
    np.testing.assert_allclose(first["loss_curve"], second["loss_curve"], rtol=1e-6)  # an interval may have been left in its midst
    assert first["validations"] == second["validations"]


def load_summary(path: Path) -> dict:  # type: ignore[type-arg]

    return json.loads((path / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.long
def test_a_hung_and_a_killed_worker_change_nothing(
    undisturbed: Path, images: ImageSettings, ray_local: ClusterSettings, tmp_path: Path
) -> None:
    stage = Listening(ray_local)
    with meanwhile(tmp_path, [(160, signalled(signal.SIGSTOP)), (480, signalled(signal.SIGKILL))]):
        tokenize(Images(images), replace(SETTINGS, path=str(tmp_path), hang_seconds=5), stage)
    assert_the_same(tmp_path, undisturbed)
    text = "\n".join(stage.said)
    assert text.index("hangs") < text.index("died")
    assert text.count("2 workers running again") == 2


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_killed_command_resumes(undisturbed: Path, images: ImageSettings, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "tokenizer"
    changed = {name: value for name, value in vars(replace(SETTINGS, path=str(path))).items() if value != getattr(load().tokenizer, name)}
    assignments = {"images.source": images.source, "images.size": 16, "images.held_out_folder": "held_out", "cluster.cpus": 2} | {
        f"tokenizer.{name}": value for name, value in changed.items()
    }
    command = [sys.executable, "-m", "jobs", "tokenize", *(f"--set={name}={value}" for name, value in assignments.items())]
    command += [f"--set=tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    first = subprocess.Popen(command, cwd=Path(__file__).parents[3], env={**os.environ, "RAY_worker_niceness": "0"})
    while seen(path) < 320:
        assert first.poll() is None
        time.sleep(0.01)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(number)
    assert first.wait(timeout=60) != 0
    psutil.wait_procs(children, timeout=60)
    assert 320 <= seen(path) <= 800  # a request to stop takes a second to arrive
    assert subprocess.run(command, cwd=Path(__file__).parents[3], env={**os.environ, "RAY_worker_niceness": "0"}).returncode == 0
    assert_the_same(path, undisturbed)
