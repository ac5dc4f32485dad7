"""Validation while training, through a real Ray Train: what it measures, where it is told, what it does not stop."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from listening import Listening
from mlflow import MlflowClient
from PIL import Image
from tiny_cache import ARCHITECTURE, write_latents
from tiny_run import CLASSES, SIZE, write_images, write_tokenizer

from jobs.training import train
from pipelines.checkpoints.retention import Scores
from pipelines.evaluation.record import metric_name
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.stage import evaluate
from pipelines.evaluation.statistics import FeatureStatistics
from pipelines.evaluation.validation import Validation, plan_validation, validate
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.runtime.supervision.channel import STOP, TrainingChannel
from pipelines.runtime.supervision.messages import Validated
from pipelines.runtime.tracking import Tracker, TrackingSettings
from pipelines.tokenizing.directory import tokenizer_digest
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.training.settings import TrainSettings

NAME = metric_name("efficientnet-lite0")
SAMPLES = 10


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory, ray_local: ClusterSettings) -> dict[str, Any]:
    """A run of one worker over 96 images, validated at every 32; the other CPU is the validation's."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = TokenizerSettings(path=write_tokenizer(root / "tokenizer"))
    cache = write_latents(root / "cache", classes=tuple(CLASSES))
    manifest = storage.read_json(f"{cache.path}/manifest.json")
    manifest |= {"tokenizer": {"path": tokenizer.path, "digest": tokenizer_digest(tokenizer.path)}, "image_size": SIZE}
    storage.write_json(f"{cache.path}/manifest.json", manifest)
    return {
        "images": Images(ImageSettings(source=write_images(root / "images"), size=SIZE, held_out_folder="held_out")),
        "tokenizer_path": tokenizer.path,
        "cache": cache,
        "model": ARCHITECTURE,
        "train": TrainSettings(
            path=str(root / "train"), images=96, batch=16, micro_batch=8, warmup_images=16, workers=1, precision="float32",
            checkpoint_images=32, log_images=48, validation_images=32, validation_samples=SAMPLES, failures=0, peak_tflops=0.1,
            keep_best=f"validation_{NAME}",
        ),
        "generate": GenerateSettings(ar_steps=2, diffusion_steps=2, batch=4, precision="float32"),
        "evaluate": EvaluateSettings(path=str(root / "evaluation"), images=SAMPLES, features="efficientnet-lite0", batch=8),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "reference", "remark"),
    [
        (10, 24, "10 samples, 3 s; warning: far too few images"),
        (1000, 50_000, "1,000 samples, 3 s; caution: fewer images than the 1,280 features"),
        (1280, None, "1,280 samples, 3 s"),
    ],
)
def test_a_line_about_few_samples_says_so(tmp_path: Path, count: int, reference: int | None, remark: str) -> None:
    statistics = FeatureStatistics(np.zeros(2), np.eye(2), reference)
    nobody: Any = SimpleNamespace(of_validation=lambda metrics: None)
    validation = Validation(
        nobody, TrainSettings(validation_samples=count), nobody, "efficientnet-lite0", "", "digest", statistics, 0, nobody
    )
    stage = Listening(nobody)
    validation.report(Validated(96, {NAME: 12.345}, "s3://none/there.png", 3.2), stage, nobody)
    assert stage.said == [f"validation at 96 images: {NAME} 12.35 ({remark})"]


@pytest.mark.long
def test_training_is_validated_while_it_goes_on(sections: dict[str, Any], ray_local: ClusterSettings, tmp_path: Path) -> None:
    tracking = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db")
    stage = Stage("train", ray_local, start_tracking=lambda: Tracker.open(tracking, "train", {}, sections["train"].path))
    summary = train(**sections, stage=stage)
    assert summary["images_seen"] == 96
    assert 0 < summary["mfu"] < 10
    assert 0 <= summary["data_wait_share"] + summary["checkpoint_share"] < 1
    assert summary["communication_share"] == 0.0  # one worker

    folder = Path(sections["train"].path) / "validation"
    found = {one["validated"]: one for one in (storage.read_json(str(path)) for path in sorted(folder.glob("*.json")))}
    assert list(found)[-1] == 96
    assert found.keys() <= {32, 64, 96}  # one that was written while another waited to be reported gives way to it
    assert all(one["samples"] == SAMPLES and one["reference_images"] == 24 for one in found.values())
    assert all(one["caution"].startswith("warning: 10 samples and 24 reference images are far too few") for one in found.values())
    assert len({one["metrics"][NAME] for one in found.values()}) == len(found)  # other weights each time
    scores = Scores(sections["train"].path, sections["train"].keep_best, found[96]["identity"])
    assert scores == {f"images-{seen:012d}": one["metrics"][NAME] for seen, one in found.items()}
    with Image.open(folder / "images-000000000096.png") as picture:
        assert picture.size[0] > 3 * SIZE

    # the stage evaluate, which draws and judges through Ray Data, finds the same distance for the same checkpoint
    rest = {name: sections[name] for name in ("images", "tokenizer_path", "evaluate")}
    again = evaluate(
        **rest, train_path=sections["train"].path, generate=replace(sections["generate"], batch=SAMPLES), stage=Stage("evaluate", ray_local)
    )
    assert found[96]["metrics"][NAME] == pytest.approx(again[NAME], rel=1e-3)

    assert stage.tracker is not None
    stage.tracker.close()
    client, run = MlflowClient(tracking.uri), stage.tracker.run_id
    history = client.get_metric_history(run, f"validation_{NAME}")
    assert {point.step: point.value for point in history} == {seen: one["metrics"][NAME] for seen, one in found.items()}
    assert {f"images-{seen:012d}.png" for seen in found} <= {one.path for one in client.list_artifacts(run)}


@pytest.mark.long
def test_a_checkpoint_that_is_gone_or_damaged_is_told_and_training_goes_on(sections: dict[str, Any], stage: Stage, tmp_path: Path) -> None:
    rest = {name: value for name, value in sections.items() if name not in ("cache", "model")}
    validation, channel, told = plan_validation(**rest, stage=stage), TrainingChannel(), list[str]()
    (tmp_path / "images-000000000032").mkdir()
    with channel.listening(lambda message: told.append(message.text)):
        assert validate(None, str(tmp_path / "images-000000000016"), validation, channel) == {}  # type: ignore[arg-type]
        with pytest.raises(UserError):
            validate(None, str(tmp_path / "images-000000000032"), validation, channel)  # type: ignore[arg-type]
    assert len(told) == 2
    assert "images-000000000016 was dropped before its validation began: raise train.validation_images" in told[0]
    assert "images-000000000032 failed, training continues: UserError" in told[1]


@pytest.mark.long
def test_a_run_that_is_asked_to_end_does_not_wait_for_validations(sections: dict[str, Any], stage: Stage) -> None:
    rest = {name: value for name, value in sections.items() if name not in ("cache", "model")}
    validation, channel = plan_validation(**rest, stage=stage), TrainingChannel()
    path = f"{sections['train'].path}/checkpoints/images-{96:012d}"
    assert storage.exists(path)
    told: list[Any] = []
    with channel.listening(told.append):
        channel.ask(STOP)
        while not channel.stopping():
            time.sleep(0.05)
        assert validate(None, path, validation, channel) == {}  # type: ignore[arg-type]
    assert told == []


@pytest.mark.long
def test_validation_needs_room_beside_the_workers(sections: dict[str, Any], stage: Stage) -> None:
    with pytest.raises(UserError, match=r"train\.workers 2 and validations at once .* 1: 3 workers.*the cluster has 2 CPUs"):
        train(**{**sections, "train": replace(sections["train"], workers=2)}, stage=stage)
    with pytest.raises(UserError, match=r"train\.validation_samples is 1, expected 2 or more"):
        train(**{**sections, "train": replace(sections["train"], validation_samples=1)}, stage=stage)
