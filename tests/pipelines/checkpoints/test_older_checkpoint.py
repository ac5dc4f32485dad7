"""Stages that draw from the newest checkpoint name each damaged one that they pass over."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from listening import Listening
from tiny_run import write_checkpoint, write_tokenizer

from mar_model.config import Architecture
from pipelines.caching.settings import CacheSettings
from pipelines.checkpoints.directory import checkpoint_path, newest_checkpoint
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.stage import evaluate
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.stage import generate
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.sweeping.settings import SweepSettings
from pipelines.sweeping.stage import sweep
from pipelines.sweeping.trials import Sections
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.training.settings import TrainSettings

IMAGES, TRAIN, GENERATE, EVALUATE = Images(ImageSettings()), TrainSettings(), GenerateSettings(labels=[99]), EvaluateSettings()
EVALUATE = replace(EVALUATE, features="efficientnet-lite0", classifier="no classifier")
STAGES: dict[str, Callable[..., dict[str, Any]]] = {  # each ends with a mistake, once it has its checkpoint
    "generate": lambda tokenizer, train, stage: generate(tokenizer.path, train.path, GENERATE, stage),
    "evaluate": lambda tokenizer, train, stage: evaluate(IMAGES, tokenizer.path, train.path, GENERATE, EVALUATE, stage),
    "sweep": lambda tokenizer, train, stage: sweep(
        Sections(IMAGES, tokenizer.path, CacheSettings(), Architecture(), train, GENERATE, EVALUATE), SweepSettings(), stage
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerSettings, TrainSettings]:
    """A run of which the newest of two checkpoints is damaged."""
    root = tmp_path_factory.mktemp("run")
    tokenizer, train = write_tokenizer(root / "tokenizer"), str(root / "train")
    for images in (10, 20):
        write_checkpoint(Path(checkpoint_path(train, images)), tokenizer)
    Path(checkpoint_path(train, 20), "ema.safetensors").unlink()
    return TokenizerSettings(path=tokenizer), TrainSettings(path=train)


@pytest.mark.parametrize("name", STAGES)
def test_a_damaged_checkpoint_that_is_passed_over_is_named(name: str, sections: tuple[TokenizerSettings, TrainSettings]) -> None:
    stage = Listening(ClusterSettings())
    with pytest.raises((UserError, FileNotFoundError)):
        STAGES[name](*sections, stage)
    passed = [line for line in stage.said if "images-000000000020" in line]
    assert len(passed) == 1, stage.said
    assert re.match(r"checkpoint images-000000000020 skipped: .*ema\.safetensors is damaged: SHA-256 missing", passed[0])


def test_it_is_named_in_the_terminal_when_nobody_listens(
    sections: tuple[TokenizerSettings, TrainSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert newest_checkpoint(sections[1].path) == checkpoint_path(sections[1].path, 10)
    assert "checkpoint images-000000000020 skipped" in capsys.readouterr().err
