"""The command line as a person meets it: arguments in, exit status and both outputs back."""

import sys
from pathlib import Path

import pytest
from command_line import DemoIn, Mar, Result
from PIL import Image

from jobs import cli
from jobs.config.load import load
from jobs.config.schema import RunConfig


@pytest.fixture
def mar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mar:
    """`mar("train", "--preset", "demo")` in this process."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["mar", *arguments])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return Result(int(leaving.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def demo_in(tmp_path: Path) -> DemoIn:
    """`demo_in("train.workers=1")`: the demo's configuration with every path in tmp_path."""
    demo = load("demo").plain()
    keys = [f"{section}.path" for section, values in demo.items() if isinstance(values, dict) and "path" in values]
    paths = [f"{key}={tmp_path / key.partition('.')[0]}" for key in keys]

    def configure(*assignments: str) -> RunConfig:
        return load("demo", None, [*paths, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", *assignments])

    return configure


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image source of 12 images to train on and 4 held out, in two classes."""
    for part, count in (("train", 6), ("held_out", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32)).save(folder / f"{index}.png")
    return tmp_path / "images"
