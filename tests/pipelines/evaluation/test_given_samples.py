"""Evaluation of samples of others on a real Ray: one set of images in several forms, actors, resumes and references."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listening import Listening
from PIL import Image
from tiny_run import CLASSES, SIZE, write_images

from pipelines.evaluation.given_samples import evaluate_given
from pipelines.evaluation.references.building import build_reference
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError

COUNT = 45
PIXELS = np.random.default_rng(1).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
FRECHET = "frechet_distance_efficientnet-lite0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_local: ClusterSettings) -> dict[str, Any]:
    """45 samples in class folders, evaluated against 24 held-out images by one actor."""
    root = tmp_path_factory.mktemp("given")
    for number, pixels in enumerate(PIXELS):
        folder = root / "samples" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    images = Images(ImageSettings(source=write_images(root / "images"), size=256, held_out_folder="held_out"))
    settings = EvaluateSettings(path=str(root / "one"), samples=str(root / "samples"), features="efficientnet-lite0", batch=8)
    stage = Listening(ray_local)
    return {"root": root, "images": images, "settings": settings, "stage": stage, "summary": evaluate_given(images, "", settings, stage)}


def again(run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return evaluate_given(run["images"], "", replace(run["settings"], **changes), run["stage"])


def figures(summary: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in summary.items() if name.split("_standard")[0].endswith("efficientnet-lite0")}


def test_the_record_says_what_was_measured(run: dict[str, Any]) -> None:
    record = storage.read_json(f"{run['settings'].path}/evaluation.json")
    assert (record["images"], record["reference"]["images"], record["samples"]["width"]) == (COUNT, 24, SIZE)
    assert len(record["metrics"]) == 8
    assert record["left_out"] == {}
    assert 0 < record["standard_errors"][FRECHET] < record["metrics"][FRECHET]
    assert Path(run["settings"].path, "samples.png").is_file()


def test_two_actors_and_a_resume_give_the_same_numbers(run: dict[str, Any]) -> None:
    two = again(run, path=str(run["root"] / "two"), actors=2)
    assert figures(two) == pytest.approx(figures(run["summary"]), rel=1e-9)
    folder = run["root"] / "two"
    shards = sorted(folder.glob("features/*/*.arrow"))
    assert len(shards) == -(-COUNT // 8)
    shards[1].write_bytes(shards[1].read_bytes()[:1000])  # cut off by a power failure
    shards[2].unlink()
    (folder / "summary.json").unlink()
    kept = shards[0].stat().st_mtime_ns
    resumed = again(run, path=str(folder))
    assert figures(resumed) == pytest.approx(figures(run["summary"]), rel=1e-9)
    assert shards[0].stat().st_mtime_ns == kept
    with pytest.raises(UserError, match=r"evaluate\.samples"):
        again(run, path=str(folder), samples=str(run["root"] / "images" / "train"))


def test_an_npz_of_the_same_images_and_a_built_reference_give_the_same_numbers(run: dict[str, Any]) -> None:
    root = run["root"]
    files = sorted((root / "samples").rglob("*.png"))
    np.savez(root / "samples.npz", np.stack([np.asarray(Image.open(file)) for file in files]))
    images = Images(replace(run["images"].settings, size=SIZE))
    reference = str(root / "reference.npz")
    work = replace(run["settings"], path="")
    built = build_reference(reference, images, "held_out", 0, work, run["stage"])
    assert (built["images"], built["images_kept"]) == (24, 24)
    with np.load(reference) as file:
        assert json.loads(str(file["about"]))["split"] == "held_out"
        assert file["arr_0"].shape == (24, SIZE, SIZE, 3)
    assert build_reference(reference, images, "held_out", 0, work, run["stage"])["split"] == "held_out"
    with pytest.raises(UserError, match="is there already and was made of other images"):
        build_reference(reference, images, "train", 10, work, run["stage"])
    found = again(run, path=str(root / "npz"), samples=str(root / "samples.npz"), reference=reference)
    values = {name: value for name, value in figures(found).items() if not name.endswith("error")}
    assert values == pytest.approx({name: figures(run["summary"])[name] for name in values}, rel=1e-4, abs=1e-6)

    statistics = {"mu": np.zeros(1280), "sigma": np.eye(1280), "network": "efficientnet-lite0"}
    np.savez(root / "adm.npz", **statistics, arr_0=np.zeros((5, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"images of 4 × 4 pixels, the samples have 32 × 32"):
        again(run, path=str(root / "other"), reference=str(root / "adm.npz"))


def test_metrics_that_a_reference_does_not_allow_are_left_out_with_the_reason(run: dict[str, Any]) -> None:
    root = run["root"]
    np.savez(root / "fid_stats.npz", mu=np.zeros(1280), sigma=np.eye(1280), network="efficientnet-lite0")
    changes = {"path": str(root / "stats"), "reference": str(root / "fid_stats.npz")}
    found = again(run, metrics=["fid", "recall"], **changes)
    assert found[FRECHET] > 0
    assert not any(name.startswith(("recall", "class_score")) for name in found)
    record = storage.read_json(f"{root}/stats/evaluation.json")
    assert again(run, metrics=["fid", "recall"], **changes) == found  # complete: what is left out was said
    assert "holds neither features nor images" in record["left_out"]["recall_efficientnet-lite0"]
    more = again(run, metrics=["fid", "inception_score"], **changes)  # from the kept features
    assert more["class_score_mean_efficientnet-lite0"] == pytest.approx(run["summary"]["class_score_mean_efficientnet-lite0"], rel=1e-9)
