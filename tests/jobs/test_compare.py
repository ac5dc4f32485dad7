"""`mar compare`: records of every version side by side, what is refused, and when published figures stand beside them."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Mar

from jobs.config.load import PRESETS, load
from mar_model.config import PUBLISHED
from pipelines.evaluation.compared.published import published_rows, sizes
from pipelines.evaluation.features.inception import INCEPTION_DIGEST

FIRST_FORMAT = {  # as the first version wrote it
    "format_version": 1, "images": 1000, "frechet_distance_efficientnet-lite0": 88.9,
    "metrics": {"frechet_distance_efficientnet-lite0": 88.903, "label_agreement": 0.954},
    "reference": {"kind": "statistics", "digest": "904130a6", "images": 500},
    "network": {"name": "efficientnet-lite0", "digest": "57934424"},
    "generation": {"images_seen": 38_400, "temperature": 0.9, "guidance": 3.5, "path": "there", "checkpoint": "a"},
}  # fmt: skip
PAPER = {"kind": "statistics", "digest": "adm", "images": None}


def write(path: Path, record: dict[str, Any], **changes: Any) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "evaluation.json").write_text(json.dumps({**record, **changes}))
    return str(path)


def published_record(preset: str = "mar_base", **generation: Any) -> dict[str, Any]:
    """The record of the preset's evaluation."""
    config = load(preset)
    model = {**vars(PUBLISHED[preset]), "latent_size": 16, "latent_channels": 16, "classes": 1000, "image_size": 256}
    return {
        "format_version": 3, "images": config.evaluate.images, "metrics": {"fid": 2.345, "inception_score_mean": 280.5},
        "standard_errors": {"fid": 0.021}, "extrapolated": {"fid": 2.1}, "reference": PAPER,
        "network": {"name": "inception", "digest": INCEPTION_DIGEST + "0" * 56}, "model": model,
        "generation": {**vars(config.generate), "images_seen": None, **generation},
    }  # fmt: skip


def test_evaluations_stand_side_by_side_with_what_differs(mar: Mar, tmp_path: Path) -> None:
    one = write(tmp_path / "one" / "evaluation", FIRST_FORMAT)
    newer = {**FIRST_FORMAT, "format_version": 3, "standard_errors": {"label_agreement": 0.0058}, "caution": "caution: few"}
    newer["generation"] = {**FIRST_FORMAT["generation"], "temperature": 1.0, "path": "elsewhere"}
    newer["metrics"] = {"label_agreement": 0.96, "frechet_distance_efficientnet-lite0": None}
    two = write(tmp_path / "two" / "evaluation", newer)
    result = mar("compare", str(tmp_path / "one"), two.removesuffix("/evaluation"))
    assert result.status == 0
    lines = [line.split("  ") for line in result.out.splitlines()]
    table = {line[0].strip(): [cell.strip() for cell in line[1:] if cell.strip()] for line in lines if len(line) > 1}
    assert table["images seen"] == ["38,400", "38,400"]
    assert table["generate.temperature"] == ["0.9", "1.0"]
    assert table["frechet_distance_efficientnet-lite0"] == ["88.9", "–"]  # null: not finite
    assert table["label_agreement"] == ["0.954", "0.96 ± 0.0058"]
    assert "generate.guidance" not in table
    assert "generate.path" not in table
    assert "two: caution: few" in result.out
    assert one.endswith("evaluation")

    plain = json.loads(mar("compare", str(tmp_path / "one"), str(tmp_path / "two"), "--json").out)
    assert [one["metrics"]["label_agreement"] for one in plain["evaluations"]] == [0.954, 0.96]
    rows = list(csv.DictReader(io.StringIO(mar("compare", str(tmp_path / "one"), str(tmp_path / "two"), "--csv").out)))
    assert [row["label_agreement_standard_error"] for row in rows] == ["", "0.0058"]
    assert [row["name"] for row in rows] == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": 500}, r"number of samples (one: 1,000, two: 500)"),
        ({"network": {"name": "inception", "digest": "6726825d"}}, "feature network (one: efficientnet-lite0 57934424, two: inception 67"),
        ({"reference": {"kind": "statistics", "digest": "aaaa", "images": 500}}, "reference (one: 500 statistics 904130a6, two: 500"),
        ({"reference": {"kind": "statistics", "digest": "904130a6", "images": 499}}, "reference (one: 500"),
    ],
)  # fmt: skip
def test_what_is_not_comparable_is_refused_and_named(mar: Mar, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    one, two = write(tmp_path / "one", FIRST_FORMAT), write(tmp_path / "two", FIRST_FORMAT, **changes)
    result = mar("compare", one, two)
    assert (result.status, result.out) == (2, "")
    assert "can't be compared, they differ in: " + said in result.err
    assert len(result.err.splitlines()) == 1


def test_statistics_of_the_same_images_are_the_same_reference(mar: Mar, tmp_path: Path) -> None:
    made_of = {"kind": "images", "size": 32, "exif": False, "keys": "b0"}
    runs = [
        write(tmp_path / "one", FIRST_FORMAT, reference={"kind": "statistics", "digest": "a", "images": 500, "made_of": made_of}),
        write(tmp_path / "two", FIRST_FORMAT, reference={"kind": "statistics", "digest": "b", "images": 500, "made_of": made_of}),
        write(tmp_path / "three", FIRST_FORMAT, reference={**made_of, "images": 500}),
    ]
    assert mar("compare", *runs).status == 0


def test_records_that_cannot_be_read_are_one_line(mar: Mar, tmp_path: Path) -> None:
    good = write(tmp_path / "good", FIRST_FORMAT)
    newer = write(tmp_path / "newer", FIRST_FORMAT, format_version=9)
    damaged = write(tmp_path / "damaged", FIRST_FORMAT, metrics=7)
    several = tmp_path / "several"
    for name in ("a", "b"):
        write(several / name, FIRST_FORMAT)
    for path, said in (
        (newer, "has the format version 9, expected 3 or less"),
        (damaged, "evaluation.json is damaged: metrics"),
        (str(several), "holds the evaluations a, b, expected one"),
        (str(tmp_path / "nothing"), "holds no evaluation: no evaluation.json there or in evaluation/"),
    ):
        result = mar("compare", good, path)
        assert result.status == 2
        assert said in result.err
        assert len(result.err.splitlines()) == 1
    assert "give one of the two" in mar("compare", good, "--json", "--csv").err


@pytest.mark.parametrize(("preset", "fid"), [("mar_base", 2.31), ("mar_large", 1.78), ("mar_huge", 1.55)])
def test_a_run_in_the_published_setting_stands_beside_the_published_figures(mar: Mar, tmp_path: Path, preset: str, fid: float) -> None:
    run = write(tmp_path / "run", published_record(preset))
    found = json.loads(mar("compare", run, "--json").out)
    assert [(row["metrics"]["fid"], "arXiv 2406.11838" in row["source"]) for row in found["published"]] == [(fid, True)]
    text = mar("compare", run).out
    assert "2.345 ± 0.021" in text
    assert "of infinitely many samples" in text
    assert "published, with guidance" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": 10_000}, "MAR-B are left out: evaluate.images is 10000, published 50000"),
        ({"generation": published_record(ar_steps=64)["generation"]}, "generate.ar_steps is 64, published 256"),
        ({"generation": published_record(images_seen=5)["generation"]}, "images seen is 5, published 1024933600"),
        ({"network": {"name": "inception", "digest": "ffff"}}, "is not the published Inception"),
        ({"reference": {**PAPER, "made_of": {"kind": "images"}}}, "the reference is not ADM's file"),
    ],
)
def test_published_figures_are_left_out_of_another_setting(mar: Mar, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    result = mar("compare", write(tmp_path / "run", published_record(), **changes))
    assert result.status == 0
    assert said in result.out
    assert "published, with" not in result.out


def test_published_figures_are_of_the_presets() -> None:
    for name, preset in (("MAR-B", "mar_base"), ("MAR-L", "mar_large"), ("MAR-H", "mar_huge")):
        size = {key: value for key, value in sizes()[name].items() if hasattr(PUBLISHED[preset], key)}
        assert size == {key: getattr(PUBLISHED[preset], key) for key in size}
        [row] = [row for row in published_rows() if row.model == name and row.expected["generate.guidance"] != 1.0]
        config = load(preset)
        settings = {f"generate.{key}": value for key, value in vars(config.generate).items()}
        assert {key: settings[key] for key in row.expected if key in settings} == {
            key: value for key, value in row.expected.items() if key in settings
        }
        assert row.expected["images seen"] == config.train.images
        head = (PRESETS / f"{preset}.yaml").read_text().splitlines()[0]
        assert f"FID-50K {row.metrics['fid']}, Inception Score {row.metrics['inception_score_mean']}" in head
        assert yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())["generate"]["guidance"] == row.expected["generate.guidance"]
    assert len(published_rows()) == 6
