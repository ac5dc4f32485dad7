"""Configuration as text: duplicate keys, values that YAML 1.1 would turn into something else, pipes, empty paths."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import Mar

from jobs.config import load as config
from jobs.config.load import file_as_assignments, load
from jobs.config.yaml_text import DuplicateKey, parse
from pipelines.runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  batch: 256\n  flip: false\n  batch: 512\n", "the key 'batch' is given twice in one mapping, at lines 2 and 4"),
        ("seed: 1\ntrain: {batch: 256}\ntrain: {flip: false}\n", "the key 'train' is given twice in one mapping, at lines 2 and 3"),
        ("train: {batch: 1, 'batch': 2}\n", "the key 'batch' is given twice in one mapping, at line 1, columns 9 and 19"),
        ("sweep:\n  parameters:\n    model.x: [1]\n    model.x: [2]\n", "'model.x' is given twice in one mapping, at lines 3 and 4"),
        ("train: {batch: 256}\ntrain.batch: 512\n", "train.batch is given twice, in section train and as train.batch"),
    ],
)
def test_a_key_that_is_given_twice_is_an_error_with_both_lines(mar: Mar, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    result = mar("train", "--config", str(file), "--print-config")
    assert (result.status, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith(f"mar: error: {file}: ")
    assert said in line


def test_a_key_that_is_given_twice_in_a_preset_or_a_value(mar: Mar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = "sweep.parameters={generate.temperature: [1.0], generate.temperature: [2.0]}"
    result = mar("sweep", "--set", twice)
    assert result.status == 2
    assert "'generate.temperature' is given twice in one mapping, at line 1, columns 2 and 31" in result.err
    (tmp_path / "mine.yaml").write_text("seed: 1\nseed: 2\n")
    monkeypatch.setattr(config, "PRESETS", tmp_path)
    with pytest.raises(UserError, match="preset mine: the key 'seed' is given twice in one mapping, at lines 1 and 2"):
        load("mine")


def test_a_merged_mapping_may_be_overridden() -> None:
    text = "one: &one {x: 1, y: 2}\ntwo: &two {<<: *one, x: 3}\nthree: {inner: {<<: *two, y: 4}}\n"
    assert parse(text) == yaml.safe_load(text)
    with pytest.raises(DuplicateKey, match="'x' is given twice"):
        parse("one: &one {x: 1, x: 2}\ntwo: {<<: *one}\n")


def test_names_stay_names() -> None:
    labels = "generate.labels=[no, on, y, 010, 12:30, 2024-01-01, 1e3, 7, 1_000, '3', =]"
    assert load(assignments=[labels]).generate.labels == ["no", "on", "y", "010", "12:30", "2024-01-01", "1e3", 7, 1000, "3", "="]
    assert load(assignments=["train.flip=off"]).train.flip is False
    assert load(assignments=["seed=010"]).seed == 10  # not octal
    swept = load(assignments=["sweep.parameters={generate.limit_x0: [on, off], generate.temperature: [1e0, 9e-1]}"]).sweep.parameters
    assert swept == {"generate.limit_x0": [True, False], "generate.temperature": [1.0, 0.9]}


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("train.batch=34:08", "train.batch is '34:08', expected a whole number"),
        ("generate.labels=[true]", "generate.labels is [True], expected a list of whole numbers or names"),
        ("tokenizer.multipliers=[true, 2]", "tokenizer.multipliers is [True, 2], expected a list of whole numbers"),
        ("=3", "--set '=3' has no key, expected section.key=value"),
        ('cache.path="runs', "--set 'cache.path=\"runs' is not a YAML value"),
    ],
)
def test_a_value_that_says_something_else_than_it_seems_is_refused(mar: Mar, assignment: str, said: str) -> None:
    result = mar("train", "--set", assignment, "--print-config")
    assert (result.status, len(result.err.splitlines())) == (2, 1)
    assert said in result.err


def test_text_is_taken_as_it_stands(mar: Mar) -> None:
    odd = "runs/a # b: [c] & {d}"
    assert load(assignments=[f"train.path={odd}"]).train.path == odd
    assert load(assignments=["train.path='a b'"]).train.path == "a b"
    shown = mar("generate", "--out", odd, "--image", "'a'.png", "--mask", "ü 🎨.png", "--label", "010", "--label", "7", "--print-config")
    generate = yaml.safe_load(shown.out)["generate"]
    assert [generate[name] for name in ("path", "image", "mask", "labels")] == [odd, "'a'.png", "ü 🎨.png", ["010", 7]]


def test_odd_text_travels_in_a_file(tmp_path: Path) -> None:
    names = ["ü 🎨", "010", "no", "a # b", "'q'", "[x]", " y ", "12:30", ""]
    file = tmp_path / "odd.yaml"
    for name in names:
        file.write_text(yaml.safe_dump({"images": {"held_out_folder": name}, "generate": {"labels": [name]}}, allow_unicode=True))
        loaded = load(assignments=file_as_assignments(str(file)))
        assert (loaded.images.held_out_folder, loaded.generate.labels) == (name, [name])
        file.write_text(loaded.yaml())
        assert load(file=str(file)) == loaded


@pytest.fixture
def piped(tmp_path: Path) -> Callable[[str], str]:
    """The name of a pipe that gives a text once, as the shell's <(…) does."""

    def make(text: str) -> str:
        pipe = tmp_path / f"pipe-{len(list(tmp_path.iterdir()))}"
        os.mkfifo(pipe)
        threading.Thread(target=pipe.write_text, args=(text,), daemon=True).start()
        return str(pipe)

    return make


def test_pipes_are_read(mar: Mar, piped: Callable[[str], str]) -> None:
    assert mar("train", "--config", "/dev/null", "--print-config").status == 0
    shown = mar("train", "--config", piped("train: {batch: 256}\n"), "--print-config")
    assert yaml.safe_load(shown.out)["train"]["batch"] == 256


def test_a_configuration_that_cannot_be_read_is_a_mistake_in_one_line(mar: Mar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00train")
    for name, said in (("folder", "is a directory"), ("link", "does not exist"), ("bytes.yaml", "is not YAML"), ("", "does not exist")):
        result = mar("train", "--config", name)
        assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
        assert said in result.err
    assert not list(tmp_path.rglob("*error.log"))


def test_json_is_yaml() -> None:
    assert parse(json.dumps({"a": [1, 2.5, None, True, "x"]})) == {"a": [1, 2.5, None, True, "x"]}
