"""A damaged file is an error that names it, or is made again with a line that does; here what no whole run is needed for."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import write_checkpoint, write_tokenizer

from jobs.quickstart.attempts import Attempts
from mar_model.checkpoints.checkpoint import read_state
from mar_model.tokenizers import load_tokenizer
from pipelines.checkpoints.directory import newest_checkpoint, read_checkpoint
from pipelines.evaluation.statistics import FeatureStatistics
from pipelines.generation import samples
from pipelines.generation.samples import Samples
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.stage import Stage
from pipelines.sweeping.settings import SweepSettings
from pipelines.sweeping.stage import finished_rows
from pipelines.sweeping.trials import Trial
from pipelines.tokenizing.learning.progress import PROGRESS, read_progress, save_progress
from pipelines.training.metrics.log import MetricsLog, read_metrics

GARBAGE = b"\xff\xfe\x00no file of ours\x93\n" * 9
IDENTITY = {"train.batch": 8, "seed": 1}


@dataclass
class Entry:
    name: str
    rows: int = 0


@dataclass
class Book:
    title: str
    entries: list[Entry]
    mean: float | None = None


class Saying(Stage):
    """A stage whose lines are kept."""

    def __init__(self) -> None:
        super().__init__("train", ClusterSettings(), {"seed": 1})
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "the file is empty"),
        (b'{"title": "a", "entr', "Invalid JSON: EOF while parsing a string at line 1 column 20"),
        (GARBAGE, "Invalid JSON: expected value at line 1 column 1"),
        (b"[]", r"it holds \[\]: input should be an object"),
        (b"null", "it holds None: input should be an object"),
        (b"{}", "title is missing"),
        (b'{"title": "a", "entries": "x"}', "entries is 'x': input should be a valid"),
        (b'{"title": "a", "entries": [{"name": "b", "rows": "3"}]}', r"entries\.0\.rows is '3': input should be a valid integer"),
        (b'{"title": "a", "entries": [{"name": "b", "rows": true}]}', r"entries\.0\.rows is True: input should be a valid integer"),
    ],
)
def test_json_of_another_shape_is_named(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "book.json"
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=rf"book\.json is damaged: {found}.*; write it again$"):
        storage.read_json(str(path), Book, "write it again")


def test_json_of_the_right_shape_is_returned_whole(tmp_path: Path) -> None:
    value = {"title": "ä", "entries": [{"name": "b", "other": [1]}], "mean": 2, "more": {"x": None}}
    storage.write_json(str(tmp_path / "book.json"), value)
    assert storage.read_json(str(tmp_path / "book.json"), Book) == value
    (tmp_path / "nan.json").write_text('{"title": "", "entries": [], "mean": NaN}')
    assert np.isnan(storage.read_json(str(tmp_path / "nan.json"), Book)["mean"])
    with pytest.raises(FileNotFoundError):
        storage.read_json(str(tmp_path / "none.json"), Book)


def test_the_error_comes_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(DamagedFileError("x.json is damaged: it is empty")))
    assert (type(error), str(error)) == (DamagedFileError, "x.json is damaged: it is empty")
    assert isinstance(error, UserError)


def test_a_stage_finishes_again_without_its_summary_and_knows_its_identity_without_its_record(tmp_path: Path) -> None:
    path, stage = tmp_path / "out", Saying()
    assert stage.begin(str(path), IDENTITY) is None
    storage.write_bytes(f"{path}/model", b"weights")
    written = stage.complete(str(path), IDENTITY, {"images_seen": 64})
    for damage in (b"", b"[]", GARBAGE, None):
        stage.said.clear()
        for name in ("identity.json", "configuration.json"):
            (path / name).unlink() if damage is None else (path / name).write_bytes(damage)
        differing = r"differing settings: seed \(found 1, expected 2\).*out/identity\.json"
        with pytest.raises(UserError, match=differing):  # never taken for another's
            stage.begin(str(path), {**IDENTITY, "seed": 2})
        assert stage.begin(str(path), IDENTITY) == written
        state = "missing" if damage is None else "damaged"
        assert f"identity.json is {state}" in stage.said[0]
        assert f"configuration.json is {state}" in stage.said[1]
        assert (storage.read_json(f"{path}/identity.json"), storage.read_json(f"{path}/configuration.json")) == (IDENTITY, {"seed": 1})
    for damage in (b"", b"{}", b"null", b'{"rows": "x"}', GARBAGE):
        stage.said.clear()
        (path / "summary.json").write_bytes(damage)
        assert stage.begin(str(path), IDENTITY) is None  # what was made is kept, and the stage finished again
        assert "out/summary.json is damaged" in stage.said[0]
    (path / "identity.json").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"out/identity\.json is damaged: the file is empty; restore it from a copy; or delete it"):
        stage.begin(str(path), IDENTITY)


def test_a_trial_whose_record_is_damaged_runs_again(tmp_path: Path) -> None:
    nothing: Any = None
    trials = [Trial(name, str(tmp_path / name), {}, nothing) for name in ("a", "b", "c")]
    row = {"trial": "a", "parameters": {}, "metric": 1.0, "metrics": {"loss": 1.0}, "seconds": 2.0, "error": None}
    storage.write_json(str(tmp_path / "a" / "trial.json"), row)
    storage.write_json(str(tmp_path / "b" / "trial.json"), {**row, "metric": "low"})
    stage = Saying()
    assert finished_rows(trials, SweepSettings(), stage) == {"a": row}
    assert "b/trial.json is damaged: metric is 'low'" in stage.said[0]
    assert "the trial runs again" in stage.said[0]


def test_lines_of_metrics_that_are_damaged_are_left_out_and_counted(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    lines = [json.dumps({"images_seen": seen, "loss": 0.5}).encode() for seen in (64, 128, 192)]
    path.write_bytes(b"\n".join([lines[0], b"[]", lines[1], b"\xff\xfe", lines[2][:9]]))  # the last is what kill -9 leaves
    rows, error = read_metrics(str(path))
    assert [row["images_seen"] for row in rows] == [64, 128]
    assert "metrics.jsonl is damaged: line 2 is damaged: it holds []" in str(error)
    assert str(error).endswith("; 2 of 4 lines are left out")
    assert len(MetricsLog(str(path), 192, say=said.append).rows) == 2
    assert said == [str(error)]
    assert path.read_bytes() == b"\n".join([*lines[:2], b""])
    path.write_bytes(lines[0] + b"\n" + lines[1][:20])
    assert read_metrics(str(path))[1] is None
    path.write_bytes(GARBAGE.replace(b"\n", b""))
    assert str(read_metrics(str(path))[1]).endswith("; 1 of 1 lines are left out")


@pytest.mark.parametrize("damage", [b"", b"[]", b"null", b"{}", b'{"format_version": 1}', GARBAGE])
def test_checkpoints_and_tokenizers_name_the_damaged_file(tmp_path: Path, damage: bytes) -> None:
    tokenizer, checkpoint = tmp_path / "tokenizer", tmp_path / "train" / "checkpoints" / "images-000000000640"
    write_checkpoint(checkpoint, write_tokenizer(tokenizer))
    assert read_checkpoint(str(checkpoint))["images_seen"] == 640
    for name in ("config.json", "tokenizer.safetensors"):
        data = (tokenizer / name).read_bytes()
        (tokenizer / name).write_bytes(damage)
        with pytest.raises(ValueError, match=f"tokenizer/{name}"):
            load_tokenizer(tokenizer)
        (tokenizer / name).write_bytes(data)
    (checkpoint / "state.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"images-000000000640/state\.json"):
        read_state(checkpoint)
    said: list[str] = []
    assert newest_checkpoint(str(tmp_path / "train"), said.append) is None
    assert "images-000000000640/state.json" in said[0]


def test_a_state_without_what_its_users_need_does_not_verify(tmp_path: Path) -> None:
    checkpoint = tmp_path / "train" / "checkpoints" / "images-000000000640"
    write_checkpoint(checkpoint, write_tokenizer(tmp_path / "tokenizer"))
    whole = storage.read_json(str(checkpoint / "state.json"))
    for key, value in {"latent_mean": "x", "tokenizer": {}, "image_size": None, "model": {"encoder_depth": "x"}, "files": {}}.items():
        storage.write_json(str(checkpoint / "state.json"), {**whole, key: value})
        with pytest.raises(DamagedFileError, match=rf"state\.json is damaged: {key}"):
            read_checkpoint(str(checkpoint))


def test_samples_statistics_progress_and_attempts(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    samples.write_samples(str(tmp_path), Samples(0, np.arange(2), np.zeros(2, np.int64), pixels, np.zeros(2, np.float32)))
    save_progress(str(tmp_path), {"weight.bias": torch.arange(64.0)}, 32, [[16, 0.5], [32, 0.25]], [[32, 21.5]])
    progress = read_progress(str(tmp_path))
    assert progress is not None
    assert progress[1:] == (32, [[16, 0.5], [32, 0.25]], [[32, 21.5]])
    assert progress.tensors["weight.bias"].equal(torch.arange(64.0))
    FeatureStatistics(np.zeros(2), np.eye(2), 3, "inception", "0").save(str(tmp_path / "reference.npz"))
    readers = {
        "shards/samples-00000000-00000002.parquet": lambda: samples.read_samples(str(tmp_path), 0, 2),
        "reference.npz": lambda: FeatureStatistics.load(str(tmp_path / "reference.npz")),
        PROGRESS: lambda: read_progress(str(tmp_path)),
    }
    for name, read in readers.items():
        whole = (tmp_path / name).read_bytes()
        read()
        for damage in (b"", b"[]", GARBAGE, whole[: len(whole) // 2], whole[:-30]):
            (tmp_path / name).write_bytes(damage)
            with pytest.raises(DamagedFileError, match=f"{name} is damaged: .*; "):
                read()
    (tmp_path / "attempts.json").write_bytes(b'[{"seconds": "x"}]')
    said: list[str] = []
    attempts = Attempts(str(tmp_path / "attempts.json"), said.append)
    assert (attempts.resumed, attempts.earlier, "attempts.json is damaged: 0.seconds is 'x'" in said[0]) == (True, [], True)
