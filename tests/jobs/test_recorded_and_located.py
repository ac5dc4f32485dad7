"""Relative paths are taken from where the person stands, whatever directory a worker runs in."""

import os
from pathlib import Path

import pytest

from jobs.config.load import load
from jobs.config.schema import LOCATIONS


def test_local_paths_become_absolute_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load("demo", None, ["cache.path=s3://bucket/cache", "evaluate.weights=~/weights.pth"])
    located = config.located()
    assert located.train.path == str(tmp_path / "runs/demo/train")
    assert located.cache.path == "s3://bucket/cache"
    assert located.evaluate.weights == os.path.expanduser("~/weights.pth")
    assert located.generate.checkpoint == ""  # not set stays not set
    assert config.train.path == "runs/demo/train"
    assert located.plain() != config.plain()
    same = {**located.plain(), **{key.partition(".")[0]: None for key in LOCATIONS}}
    assert same == {**config.plain(), **{key.partition(".")[0]: None for key in LOCATIONS}}


def test_recorded_configuration_holds_no_password() -> None:
    config = load("demo", None, ["tracking.uri=https://person:secret@mlflow.example"])
    assert "secret" not in str(config.recorded())
    assert "mlflow.example" in config.recorded()["tracking"]["uri"]
    assert config.tracking.uri == "https://person:secret@mlflow.example"
