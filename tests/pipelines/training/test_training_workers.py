"""Training on several workers: the same step on 1, 2 and 4, sharded or not; hung and interrupted, it ends as if nothing was."""

import contextlib
import importlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from checkpoint_files import save_checkpoint
from disturbed_run import BATCH, FILES, RECIPE, STEPS, assert_bitwise, losses, meanwhile, signalled, tensors
from listening import Listening
from safetensors.torch import load_file
from tiny_cache import ARCHITECTURE, TOKENIZER, write_latents

from mar_model.checkpoints.checkpoint import load_model
from mar_model.mar import MAR
from mar_model.training.sample_order import SampleOrder
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.checkpoints.directory import checkpoint_names, checkpoint_path, newest_checkpoint
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.training.stage import model_config, train


@pytest.fixture(scope="module")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSettings]:
    settings = ClusterSettings(cpus=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(settings, Path(tmp_path_factory.mktemp("ray")) / "ray.log"):
            yield settings


@pytest.fixture
def stage(ray_local: ClusterSettings) -> Listening:
    return Listening(ray_local)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheSettings:
    return write_latents(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def undisturbed(ray_local: ClusterSettings, cache: CacheSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two workers that nothing happened to."""
    path = Path(tmp_path_factory.mktemp("undisturbed"))
    train(TOKENIZER.path, cache, ARCHITECTURE, replace(RECIPE, path=str(path)), Listening(ray_local))
    return path


def assert_same_up_to_summation_order(run: Path, expected: Path) -> None:
    for file in FILES[:3]:
        found, wanted = tensors(run, file), tensors(expected, file)
        difference = sum(float((found[name] - wanted[name]).double().square().sum()) for name in wanted)
        assert (difference / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5 < 1e-5, file
        for name, value in wanted.items():  # an attention's key bias changes nothing: its gradient is rounding alone, and Adam scales it up
            if not name.endswith("qkv.bias"):
                assert float((found[name] - value).norm() / value.norm().clamp(min=1e-3)) < 1e-5, name
    np.testing.assert_allclose(losses(run), losses(expected), rtol=1e-5)


@pytest.mark.long
def test_the_same_50_steps_on_1_2_and_4_workers_sharded_or_not(
    undisturbed: Path, cache: CacheSettings, stage: Listening, tmp_path: Path
) -> None:
    alone, others = tmp_path / "alone", replace(RECIPE, path=str(tmp_path / "others"))
    train(TOKENIZER.path, cache, ARCHITECTURE, replace(RECIPE, path=str(alone), workers=1), stage)
    assert_same_up_to_summation_order(undisturbed, alone)
    train(TOKENIZER.path, cache, ARCHITECTURE, replace(others, strategy="fsdp", workers=3, images=30 * BATCH), stage)  # one has two of four
    train(TOKENIZER.path, cache, ARCHITECTURE, replace(others, workers=4), stage)  # goes on with the checkpoint of the sharded run
    assert_same_up_to_summation_order(tmp_path / "others", alone)
    last = Path(checkpoint_path(str(alone), STEPS * BATCH))
    quick = load_model(last, decay=0.9)[0].mask_token
    assert torch.equal(quick, load_file(last / "ema-0.9.safetensors")["mask_token"])
    assert torch.equal(load_model(last, decay=0.99)[0].mask_token, load_file(last / "ema.safetensors")["mask_token"])
    with pytest.raises(ValueError, match=r"no average of decay 0\.5, only of 0\.99, 0\.9"):
        load_model(last, decay=0.5)


@pytest.mark.long
def test_a_hung_and_a_killed_worker_change_nothing(undisturbed: Path, cache: CacheSettings, stage: Listening, tmp_path: Path) -> None:
    with meanwhile(tmp_path, [(160, signalled(signal.SIGSTOP)), (480, signalled(signal.SIGKILL))]):
        train(TOKENIZER.path, cache, ARCHITECTURE, replace(RECIPE, path=str(tmp_path), hang_seconds=5), stage)
    assert_bitwise(tmp_path, undisturbed)
    text = "\n".join(stage.said)
    assert text.index("hangs") < text.index("died")
    assert text.count("2 workers running again") == 2


def named(part: str) -> list[psutil.Process]:
    """Processes of Ray's that are at this, by their titles."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"ray::{part}" in " ".join(one.cmdline()):
                found.append(one)
    return found


@contextlib.contextmanager
def as_soon_as(doing: str, kind: signal.Signals, times: int = 1) -> Iterator[None]:
    """The first processes that are found at this get this signal at once."""
    done = set[int]()

    def act() -> None:
        while len(done) < times:
            for process in named(doing)[: times - len(done)]:
                if process.pid not in done:
                    process.send_signal(kind)
                    done.add(process.pid)
            time.sleep(0.005)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield
    thread.join(timeout=1)
    assert not thread.is_alive(), f"nobody did {doing}"


@contextlib.contextmanager
def taken(cpus: int) -> Iterator[ray.util.placement_group]:
    """So many of the cluster's CPUs are somebody else's."""
    room = ray.util.placement_group([{"CPU": 1}] * cpus)
    assert room.wait(30)
    try:
        yield room
    finally:
        ray.util.remove_placement_group(room)


@pytest.mark.long
@pytest.mark.parametrize(
    ("doing", "kind", "cause"),
    [
        ("RayTrainWorker", signal.SIGSTOP, "a worker hangs before its process has started: 15 s after"),
        ("RayTrainWorker.init_train_context", signal.SIGSTOP, r"worker [01] \(process \d+ on [\d.]+\) hangs: 15 s after"),
        ("execute._setup_torch", signal.SIGSTOP, "a worker hangs"),
        ("execute._setup_torch", signal.SIGKILL, r"a worker (died|failed) \(.* while the group started"),  # or one that saw it first
    ],
)
def test_a_worker_that_hangs_or_dies_while_its_group_starts(
    undisturbed: Path, cache: CacheSettings, stage: Listening, tmp_path: Path, doing: str, kind: signal.Signals, cause: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipelines.runtime.supervision.controller.START_SECONDS", 15)
    with taken(2), as_soon_as(doing, kind):  # the next start has only the room of the first
        train(TOKENIZER.path, cache, ARCHITECTURE, replace(RECIPE, path=str(tmp_path), hang_seconds=5), stage)
    assert_bitwise(tmp_path, undisturbed)
    told = [line for line in stage.said if "restarting" in line]
    assert len(told) == 1
    assert re.match(cause, told[0])


@pytest.mark.long
def test_a_group_waits_for_room_and_is_given_up_when_it_never_starts(cache: CacheSettings, stage: Listening, tmp_path: Path) -> None:
    run, waiting = replace(RECIPE, path=str(tmp_path), workers=1, failures=1), "no resources for 1 workers: waiting"

    def make_room(room: ray.util.placement_group) -> None:
        while not any(waiting in line for line in stage.said):
            time.sleep(0.05)
        ray.util.remove_placement_group(room)

    with taken(4) as room, as_soon_as("RayTrainWorker", signal.SIGKILL, 2):
        threading.Thread(target=make_room, args=[room], daemon=True).start()
        with pytest.raises(RuntimeError, match=r"failed to start 2 times in a row \(train\.failures\): a worker died"):
            train(TOKENIZER.path, cache, ARCHITECTURE, run, stage)
    assert sum(waiting in line for line in stage.said) == sum("restarting" in line for line in stage.said) == 1


@pytest.mark.long
def test_workers_that_cannot_read_what_they_are_sent_are_not_started_again(
    cache: CacheSettings, stage: Listening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node with other code than the driver's."""
    monkeypatch.setattr("pipelines.training.stage.train_worker", Unreadable())
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        train(TOKENIZER.path, cache, ARCHITECTURE, replace(RECIPE, path=str(tmp_path)), stage)
    assert not any("restarting" in line for line in stage.said), stage.said


class Unreadable:
    def __call__(self, loop_config: object) -> None:
        raise AssertionError

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("no_such_module",)


@pytest.mark.long
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_with_a_checkpoint_from_which_it_goes_on(
    undisturbed: Path, cache: CacheSettings, stage: Listening, tmp_path: Path
) -> None:
    settings = replace(RECIPE, path=str(tmp_path), checkpoint_images=320)
    with meanwhile(tmp_path, [(320, lambda: os.kill(os.getpid(), signal.SIGINT))]), pytest.raises(KeyboardInterrupt):
        train(TOKENIZER.path, cache, ARCHITECTURE, settings, stage)
    ended = newest_checkpoint(str(tmp_path))
    assert ended is not None
    assert int(ended[-12:]) not in (320, 640, 800)
    assert stage.said[-1] == f"stopped with {ended}; run the same command to resume"
    train(TOKENIZER.path, cache, ARCHITECTURE, settings, stage)
    assert_bitwise(tmp_path, undisturbed)


@pytest.mark.long
def test_a_mistake_is_not_tried_again(cache: CacheSettings, stage: Listening, tmp_path: Path) -> None:
    other = MAR(replace(model_config(ARCHITECTURE, LatentCache(cache.path)), encoder_depth=2))
    path = Path(checkpoint_path(str(tmp_path), 160))
    state = {"images_seen": 160, "step": 10, "intervals": []}
    save_checkpoint(path, other, dict(other.named_parameters()), state)
    with pytest.raises(ValueError, match=r"weights don't fit the model: unexpected \(12\): encoder_blocks.1"):
        train(TOKENIZER.path, cache, ARCHITECTURE, replace(RECIPE, path=str(tmp_path)), stage)
    assert not any("restarting" in line for line in stage.said)


@pytest.mark.long
def test_steps_that_are_not_finite_are_skipped_and_end_the_run_when_they_go_on(stage: Listening, tmp_path: Path) -> None:
    order = SampleOrder(3, 160)
    unsound = [int(order.indices(image, image + 1)[0]) for image in (16, 50, 70)]  # of the steps at 16, 48 and 64 images
    cache = write_latents(tmp_path / "cache", rows=160, unsound=unsound)
    run = replace(RECIPE, path=str(tmp_path / "run"), images=160, workers=1, checkpoint_images=16, checkpoints_kept=9, nonfinite_limit=2)
    with pytest.raises(
        UserError, match=r"\(2 in a row\), which is train\.nonfinite_limit; the checkpoint at 48 images precedes these steps"
    ):
        train(TOKENIZER.path, cache, ARCHITECTURE, run, stage)
    skipped = [line for line in stage.said if "is not finite" in line]
    assert [line.partition(" is not")[0] for line in skipped] == [
        f"the loss of micro-batch {micro_batch} (worker 0, images from position {first})"
        for micro_batch, first in ((0, 16), (0, 48), (1, 68))
    ]
    assert newest_checkpoint(run.path) == checkpoint_path(run.path, 48)
    assert checkpoint_names(run.path) == ["images-000000000016", "images-000000000048"]  # none while a step is skipped
    for file in FILES:
        assert all(bool(torch.isfinite(value).all()) for value in load_file(Path(checkpoint_path(run.path, 48)) / file).values())
