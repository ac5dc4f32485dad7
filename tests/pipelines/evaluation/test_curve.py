"""Every checkpoint of a training run, evaluated on a real Ray: the curve, its causes, and what a later attempt keeps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listening import Listening
from PIL import Image
from tiny_run import CLASSES, SIZE, write_checkpoint, write_images, write_tokenizer

from pipelines.evaluation.causes.memorisation import SHARE
from pipelines.evaluation.compared.records import find_record
from pipelines.evaluation.curve.stage import evaluate
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError

FRECHET = "frechet_distance_efficientnet-lite0"
SEEN = (640, 1280)
DRAWN = 18


class Recording(Listening):
    """Remembers what it logged: (step, metrics)."""

    def __init__(self, cluster: ClusterSettings) -> None:
        super().__init__(cluster, seed=3)
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_local: ClusterSettings) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("run")
    tokenizer = write_tokenizer(root / "tokenizer")
    for seen in SEEN:
        (root / "train" / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_checkpoint(root / "train" / "checkpoints" / f"images-{seen:012d}", tokenizer)
    sections = {
        "images": Images(ImageSettings(source=write_images(root / "images"), size=SIZE, held_out_folder="held_out")),
        "tokenizer_path": tokenizer,
        "train_path": str(root / "train"),
        "generate": GenerateSettings(ar_steps=2, diffusion_steps=2, batch=9, precision="float32"),
        "evaluate": EvaluateSettings(
            path=str(root / "curve"), images=DRAWN, features="efficientnet-lite0", batch=12, checkpoints="all", training_images=15
        ),
    }
    stage = Recording(ray_local)
    return {"root": root, "sections": sections, "stage": stage, "summary": evaluate(**sections, stage=stage)}


def test_each_checkpoint_has_its_own_record_and_its_point(run: dict[str, Any]) -> None:
    path = run["root"] / "curve"
    curve = json.loads((path / "curve.json").read_text())
    assert [point["images_seen"] for point in curve["points"]] == list(SEEN)
    for point in curve["points"]:
        record = storage.read_json(str(path / point["checkpoint"] / "evaluation.json"))
        assert record["format_version"] == 3
        assert point["metrics"] == {**record["metrics"], SHARE: record["memorisation"]["share"]}
        assert record["model"]["encoder_width"] == 32
    assert run["summary"]["newest"] == f"images-{SEEN[-1]:012d}"
    assert run["summary"][FRECHET] == curve["points"][-1]["metrics"][FRECHET]
    assert Image.open(path / "curve.png").width == 864
    assert (path / "curve.svg").read_text().startswith("<?xml")
    logged = {step: metrics[FRECHET] for step, metrics in run["stage"].logged if FRECHET in metrics and "images" not in metrics}
    assert logged == {point["images_seen"]: point["metrics"][FRECHET] for point in curve["points"]}
    assert find_record(str(path)) == str(path / f"images-{SEEN[-1]:012d}")


def test_the_reference_and_the_training_images_are_measured_once(run: dict[str, Any]) -> None:
    counts: dict[str, list[int]] = {}
    for file in (run["root"] / "curve").rglob("reference-*.npz"):
        with np.load(file) as arrays:
            counts.setdefault(file.parent.name, []).append(int(arrays["count"]))
    own = {f"images-{seen:012d}": [DRAWN] for seen in SEEN}  # of as many samples as reference images
    assert {name: sorted(found) for name, found in counts.items()} == {"curve": [15, 24], **own}


def test_the_causes_are_in_the_record(run: dict[str, Any]) -> None:
    folder = run["root"] / "curve" / run["summary"]["newest"]
    record = storage.read_json(str(folder / "evaluation.json"))
    table = record["by_class"]
    assert (table["classes"], table["ranked_by"]) == (3, "distance_of_means")
    assert table["distance_of_means_to"] == "the reference's mean of the class"
    assert table["best"][0]["class"] in CLASSES
    assert table["best"][0]["distance_of_means"] < table["worst"][0]["distance_of_means"]
    assert len((folder / "by_class.csv").read_text().splitlines()) == 4
    found = record["memorisation"]
    assert (found["training_images"], found["train_part"], len(found["nearest"])) == (15, 24, DRAWN)
    assert all(key.startswith("train/") for row in found["nearest"] for key in row["keys"])
    assert [row["ratio"] for row in found["nearest"]] == sorted(row["ratio"] for row in found["nearest"])
    assert found["share"] == run["summary"][SHARE]
    assert Image.open(folder / "neighbours.png").size == (4 * 66, DRAWN * 66)
    assert Image.open(folder / "classes.png").size == (6 * 66, 2 * 66)  # six samples of the best class, and of the worst


def test_a_later_attempt_evaluates_only_new_checkpoints_and_skips_damaged_ones(run: dict[str, Any]) -> None:
    sections, root = run["sections"], run["root"]
    assert evaluate(**sections, stage=run["stage"]) == storage.read_json(str(root / "curve" / "summary.json"))
    before = {name: (root / "curve" / name / "summary.json").stat().st_mtime_ns for name in run["summary"]["checkpoints"]}
    checkpoints = root / "train" / "checkpoints"
    storage.delete(str(checkpoints / f"images-{SEEN[0]:012d}"))  # by retention; its point stays
    for seen in (1920, 2560):
        write_checkpoint(checkpoints / f"images-{seen:012d}", sections["tokenizer_path"])
    (checkpoints / "images-000000002560" / "ema.safetensors").write_bytes(b"cut off")
    again = evaluate(**sections, stage=run["stage"])
    assert again["checkpoints"] == [f"images-{seen:012d}" for seen in (640, 1280, 1920)]
    assert again["skipped"] == ["images-000000002560"]
    assert [line for line in run["stage"].said if "images-000000002560 skipped" in line]
    assert {name: (root / "curve" / name / "summary.json").stat().st_mtime_ns for name in before} == before
    with pytest.raises(UserError, match=r"evaluate\.images \(found 18, expected 12\)"):
        evaluate(**{**sections, "evaluate": replace(sections["evaluate"], images=12)}, stage=run["stage"])


def test_contradicting_settings_are_refused(run: dict[str, Any], tmp_path: Path) -> None:
    sections, stage = run["sections"], run["stage"]
    with pytest.raises(UserError, match=r"evaluate\.checkpoints is 'all', but generate\.checkpoint is 'one'"):
        evaluate(**{**sections, "generate": replace(sections["generate"], checkpoint="one")}, stage=stage)
    with pytest.raises(UserError, match=r"train\.path '.*' holds none; run `mar train` first"):
        evaluate(**{**sections, "train_path": str(tmp_path)}, stage=stage)
