"""An output that can't be written, or an empty path: status 2, one line that names it, before any work, and no error.log anywhere."""

import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import save_checkpoint
from command_line import Mar, Result
from PIL import Image

from jobs.stage_commands import STAGES
from mar_model import MAR, MARConfig

KINDS = ("a file", "below a file", "no permission", "a loop", "no folder can be made there")
COMMANDS = {name: (name, "--set", f"{stage.writes}=OUT") for name, stage in STAGES.items()} | {
    "generate --out": ("generate", "--out", "OUT"),
    "quickstart": ("quickstart", "--set", "images.source=IMAGES", "--set", "train.path=OUT/train", "--set", "images.size=8"),
    "import": ("import", "RELEASED", "--out", "OUT"),
    "export": ("export", "CHECKPOINT", "--out", "OUT"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A source of images, a released file and a checkpoint."""
    root = tmp_path_factory.mktemp("inputs")
    for part in ("train", "held_out"):
        for name in ("cat", "dog"):
            (root / "images" / part / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (8, 8)).save(root / "images" / part / name / f"{index}.png")
    model = MAR(
        MARConfig(
            encoder_depth=1, encoder_width=64, encoder_heads=1, decoder_depth=1, decoder_width=64, decoder_heads=1, buffer_size=2,
            denoiser_depth=1, denoiser_width=24, latent_size=4, latent_channels=4, classes=3,
        )
    )  # fmt: skip
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict()}, root / "checkpoint-last.pth")
    save_checkpoint(root / "checkpoint", model, model.state_dict(), {"images_seen": 1, "latent_std": [1.0] * 4, "latent_mean": [0.0] * 4})
    return {"IMAGES": f"{root}/images", "RELEASED": f"{root}/checkpoint-last.pth", "CHECKPOINT": f"{root}/checkpoint"}


def impossible(kind: str, folder: Path) -> str:
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to("loop")
    places = {"a file": folder / "file", "below a file": folder / "file" / "below", "a loop": folder / "loop" / "below"}
    return str(places.get(kind) or {"no permission": "/sys", "no folder can be made there": "/proc/mar/runs"}[kind])


def refused(result: Result, named: str, *folders: Path) -> None:
    assert result.status == 2, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("mar: ")]
    assert len(errors) == 1, result.err
    assert errors[0].startswith("mar: error: ")
    assert named in errors[0]
    for folder in folders:
        assert not list(folder.rglob("*error.log"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written(mar: Mar, here: Path, tmp_path: Path, inputs: dict[str, str], command: str, kind: str) -> None:
    out = impossible(kind, tmp_path)
    if command == "quickstart" and kind == "no permission":
        out += "/train"  # it writes beside train.path
    words = [word.replace("OUT", out) for word in COMMANDS[command]]
    words = [inputs.get(word, word.replace("IMAGES", inputs["IMAGES"])) for word in words]
    refused(mar(*words), out, here, tmp_path)
    assert list(here.iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_and_a_folder_in_the_way(mar: Mar, here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "train").mkdir(parents=True)
    (run / "train" / "summary.json").write_text(
        '{"format_version": 1, "stage": "train", "seconds": 1.0, "images_seen": 5, "loss": 0.5, "identity": {}}'
    )
    (run / "report.html").mkdir()
    refused(mar("report", str(run)), f"{run}/report.html", here, tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below", "/proc/mar/runs"):
        refused(mar("report", str(path)), str(path), here)


def test_the_digits_below_a_file(mar: Mar, here: Path) -> None:
    (here / "runs").write_text("mine")
    refused(mar("quickstart"), "runs/demo", here)


EMPTY = [
    *[(f"{name} {stage.writes}", (name, "--set", f"{stage.writes}="), f"{stage.writes} is empty") for name, stage in STAGES.items()],
    ("generate --out", ("generate", "--preset", "demo", "--out", ""), "--out is empty"),
    ("generate --image", ("generate", "--image", ""), "--image is empty"),
    ("generate --mask", ("generate", "--mask", " "), "--mask is empty"),
    ("train tracking.uri", ("train", "--set", "tracking.uri=''"), "tracking.uri is empty"),
    ("report", ("report", ""), "RUN is empty"),
    ("import", ("import", "", "--out", "x"), "FILE is empty"),
    ("import --out", ("import", "RELEASED", "--out", ""), "--out is empty"),
    ("import --tokenizer", ("import", "RELEASED", "--out", "x", "--tokenizer", ""), "--tokenizer is empty"),
    ("export", ("export", "", "--out", "x"), "DIR is empty"),
    ("export --out", ("export", "CHECKPOINT", "--out", ""), "--out is empty"),
    ("inspect", ("inspect", ""), "CACHE is empty"),
    ("inspect --wall", ("inspect", "x", "--wall", ""), "--wall is empty"),
    ("inspect --tokenizer", ("inspect", "x", "--tokenizer", ""), "--tokenizer is empty"),
    ("verify", ("verify", ""), "CACHE is empty"),
    ("verify --source", ("verify", "x", "--source", ""), "--source is empty"),
    ("submit --address", ("submit", "--address", "", "--", "train"), "--address is empty"),
]


@pytest.mark.parametrize(("words", "said"), [one[1:] for one in EMPTY], ids=[one[0] for one in EMPTY])
def test_an_empty_path(mar: Mar, here: Path, inputs: dict[str, str], words: tuple[str, ...], said: str) -> None:
    refused(mar(*[inputs.get(word, word) for word in words]), said, here)
    assert list(here.iterdir()) == []


def test_an_empty_path_in_a_file(mar: Mar, here: Path) -> None:
    Path("mine.yaml").write_text("cache: {path: ''}\ntrain: {path: ' '}\n")
    result = mar("cache", "--config", "mine.yaml")
    assert result.status == 2
    assert [line.partition(";")[0] for line in result.err.splitlines()] == [
        "mar: error: cache.path is empty (from mine.yaml), expected an output path",
        "mar: error: train.path is empty (from mine.yaml), expected an output path",
    ]
    assert os.listdir() == ["mine.yaml"]
