"""Checkpoints: written on a thread, whole or not at all, the newest and the best kept, damage told."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_disk import largest_file
from tiny_cache import ARCHITECTURE, write_latents

from benchmarks.faulty_s3 import FaultyS3
from mar_model.checkpoints.checkpoint import AVERAGE, OPTIMIZER, STATE, WEIGHTS, load_model, optimizer_state
from mar_model.head.diffusion import TokenLoss
from mar_model.mar import MAR
from pipelines.caching.latent_cache import LatentCache
from pipelines.checkpoints.directory import checkpoint_names, forget_lost_attempts, last_validated, newest_checkpoint
from pipelines.checkpoints.retention import Scores
from pipelines.checkpoints.writer import CheckpointWriter
from pipelines.runtime import s3, storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import null_for_nan
from pipelines.training.job import TrainingJob
from pipelines.training.metrics.intervals import Interval
from pipelines.training.settings import TrainSettings
from pipelines.training.stage import model_config


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    """What a writer needs of a job; there are no workers in these tests, and so no channels to them."""
    cache = LatentCache(write_latents(tmp_path / "cache").path)
    train = TrainSettings(path=str(tmp_path / "train"), checkpoints_kept=2, keep_best="loss")
    nobody: Any = SimpleNamespace()
    return TrainingJob(model_config(ARCHITECTURE, cache), train, cache, "tokenizer", 0, nobody, nobody, None)


@pytest.fixture
def tensors(job: TrainingJob) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = MAR(job.model)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return {WEIGHTS: weights, AVERAGE: weights, OPTIMIZER: optimizer_state(model, optimizer)}


def progress(images_seen: int, loss: float = 1.0) -> dict[str, Any]:
    return {"images_seen": images_seen, "step": images_seen, "intervals": [{"images_seen": images_seen, "loss": loss}], "interval": []}


def test_the_newest_and_the_best_are_kept_and_known_to_the_next_writer(
    job: TrainingJob, tensors: dict[str, dict[str, torch.Tensor]]
) -> None:
    said: list[str] = []
    writer = CheckpointWriter(job.checkpointed(), said.append, 0)
    for images, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.0)):
        writer.begin(tensors, progress(images, loss))
    writer.wait()
    assert checkpoint_names(job.train.path) == [f"images-{images:012d}" for images in (20, 30, 40)]
    again = CheckpointWriter(job.checkpointed(), said.append, 40)  # after a kill: what was best is read from the disk
    again.finish(tensors, progress(50, 2.0))
    assert checkpoint_names(job.train.path) == [f"images-{images:012d}" for images in (20, 40, 50)]
    assert (again.newest, said) == (50, [])
    model, state = load_model(Path(newest_checkpoint(job.train.path) or ""))
    assert state["step"] == 50
    assert all(torch.equal(value, tensors[WEIGHTS][name]) for name, value in model.named_parameters())


def test_the_best_by_what_validations_found_is_kept_once_they_have_found_it(
    job: TrainingJob, tensors: dict[str, dict[str, torch.Tensor]]
) -> None:
    job = replace(job, train=replace(job.train, keep_best="validation_fid"), validated_as="these")
    writer = CheckpointWriter(job.checkpointed(), print, 0)
    for images, validated, distance in ((10, 0, 0.0), (20, 10, 9.0), (30, 20, 7.0), (40, 30, 8.0), (50, 40, 7.5)):
        if validated:  # while the next checkpoint is written
            found = {"validated": validated, "metrics": {"fid": distance}, "identity": "these"}
            storage.write_json(f"{job.train.path}/validation/images-{validated:012d}.json", found)
        writer.begin(tensors, progress(images, loss=float(images)))
        writer.wait()
    assert checkpoint_names(job.train.path) == [f"images-{images:012d}" for images in (20, 40, 50)]
    assert Scores(job.train.path, "validation_fid", "these") == {"images-000000000020": 7.0, "images-000000000040": 7.5}
    assert Scores(job.train.path, "validation_fid", "of more samples") == {}


def test_one_of_every_so_many_images_is_kept_for_good(job: TrainingJob, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    said: list[str] = []
    writer = CheckpointWriter(
        replace(job, train=replace(job.train, keep_every_images=100, keep_best="", checkpoints_kept=1)).checkpointed(), said.append, 0
    )
    for images in range(40, 401, 40):
        writer.begin(tensors, progress(images))
    writer.wait()
    assert checkpoint_names(job.train.path) == [f"images-{images:012d}" for images in (120, 200, 320, 400)]
    assert said == []


@pytest.mark.parametrize("file", [WEIGHTS, STATE])
def test_neither_a_damaged_newer_one_nor_a_score_that_is_no_number_costs_a_good_one(
    job: TrainingJob, tensors: dict[str, dict[str, torch.Tensor]], file: str
) -> None:
    said: list[str] = []
    writer = CheckpointWriter(job.checkpointed(), said.append, 0)
    for images, loss in ((100, math.nan), (200, 1.0), (300, 0.5)):
        writer.finish(tensors, progress(images, loss))
    newest = Path(job.train.path, "checkpoints", f"images-{300:012d}")
    (newest / file).write_bytes(b"{")
    assert newest_checkpoint(job.train.path, said.append) == str(newest.with_name(f"images-{200:012d}"))
    again = CheckpointWriter(replace(job, train=replace(job.train, checkpoints_kept=1)).checkpointed(), said.append, 200)
    again.finish(tensors, progress(250, 3.0))
    assert kept(job) == [200, 250, 300]  # the best, the newest, the damaged one
    again.finish(tensors, progress(350, 4.0))
    assert kept(job) == [200, 350]
    assert newest_checkpoint(job.train.path, said.append) == str(newest.with_name(f"images-{350:012d}"))
    assert len(said) == 1


def test_an_interval_without_a_finite_step_is_never_the_best(job: TrainingJob, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    job = replace(job, train=replace(job.train, keep_best="loss_band_3", checkpoints_kept=1))
    writer = CheckpointWriter(job.checkpointed(), print, 0)
    for images, finite in ((100, True), (200, False), (300, False)):
        interval = Interval(torch.device("cpu"))
        loss = torch.full((2,), 0.5)
        interval.add(TokenLoss(loss, loss, loss), torch.tensor([990, 990]), torch.tensor(finite))
        interval.steps(16, torch.tensor(1.0), torch.tensor(float(finite)), 0.1)
        line = null_for_nan({"images_seen": images, **interval.close(1)})
        writer.finish(tensors, {"images_seen": images, "step": 1, "intervals": [line], "interval": []})
    assert kept(job) == [100, 300]  # the best and the newest
    assert Scores(job.train.path, "loss_band_3")["images-000000000100"] == 0.5
    assert math.isnan(Scores(job.train.path, "loss_band_3")["images-000000000300"])


def kept(job: TrainingJob) -> list[int]:
    return [int(name[-3:]) for name in checkpoint_names(job.train.path)]


def test_the_newest_that_was_validated(tmp_path: Path) -> None:
    assert last_validated(str(tmp_path), 100) == 0
    for name in ("images-000000000032.json", "images-000000000064.json", "images-000000000096.png", "images-000000000128.json"):
        (tmp_path / "validation").mkdir(exist_ok=True)
        (tmp_path / "validation" / name).touch()
    assert last_validated(str(tmp_path), 100) == 64


def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    job: TrainingJob, tensors: dict[str, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.checkpoints.writer.PAUSE_SECONDS", 0.01)
    said: list[str] = []
    writer = CheckpointWriter(job.checkpointed(), said.append, 0)
    writer.begin(tensors, progress(10))
    writer.wait()
    with largest_file(20_000):
        writer.begin(tensors, progress(20))
        writer.wait()
        assert len(said) == 1
        assert "checkpoint at 20 images could not be written, training continues" in said[0]
        with pytest.raises(UserError, match="the last checkpoint can't be written, in 3 attempts"):
            writer.finish(tensors, progress(30))
    assert [one.name for one in Path(job.train.path, "checkpoints").iterdir()] == ["images-000000000010"]
    writer.finish(tensors, progress(40))  # there is room again
    assert checkpoint_names(job.train.path) == ["images-000000000010", "images-000000000040"]


def test_damage_is_told_and_the_one_before_is_used(job: TrainingJob, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    said: list[str] = []
    writer = CheckpointWriter(replace(job, train=replace(job.train, keep_best="")).checkpointed(), said.append, 0)
    for images in (10, 20, 30):
        writer.begin(tensors, progress(images))
    writer.wait()
    folder = Path(job.train.path, "checkpoints")
    assert checkpoint_names(job.train.path) == ["images-000000000020", "images-000000000030"]
    damaged = folder / "images-000000000030" / OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    assert newest_checkpoint(job.train.path, said.append) == str(folder / "images-000000000020")
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint images-000000000030 skipped: {damaged} is damaged: SHA-256")
    (folder / "images-000000000040").mkdir()  # as a bucket holds one whose writer was cut: `state.json` comes last
    forget_lost_attempts(job.train.path)
    assert checkpoint_names(job.train.path) == ["images-000000000020", "images-000000000030"]


def test_a_bucket_out_of_reach_during_a_checkpoint(
    job: TrainingJob, tensors: dict[str, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    said: list[str] = []
    with FaultyS3() as server:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": server.url,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(s3, "ATTEMPTS", 2)
        monkeypatch.setattr(s3, "WRITE_SECONDS", 1.0)
        boto3.client("s3").create_bucket(Bucket="runs")
        job = replace(job, train=replace(job.train, path="s3://runs/one"))
        writer = CheckpointWriter(job.checkpointed(), said.append, 0)
        writer.begin(tensors, progress(10))
        writer.wait()
        server.kinds = ("reset",)
        server.share = 1.0
        writer.begin(tensors, progress(20))
        writer.wait()
        assert len(said) == 1
        assert "checkpoint at 20 images could not be written" in said[0]
        server.share = 0.0
        assert newest_checkpoint(job.train.path) == "s3://runs/one/checkpoints/images-000000000010"
        writer.finish(tensors, progress(30))
        assert checkpoint_names(job.train.path) == ["images-000000000010", "images-000000000030"]
        assert newest_checkpoint(job.train.path) == "s3://runs/one/checkpoints/images-000000000030"
