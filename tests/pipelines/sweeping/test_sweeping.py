"""Sweeps through a real Ray Tune: the grid, what is refused before it starts, trials, failures, resume, table and plot."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from listening import Listening
from mlflow import MlflowClient
from PIL import Image
from tiny_run import write_checkpoint, write_images, write_tokenizer

from mar_model.config import Architecture
from pipelines.caching.latent_format import LatentStatistics, Manifest, shard_bytes, shard_name
from pipelines.caching.settings import CacheSettings
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.plots import sweep_plot
from pipelines.runtime.stage import Stage
from pipelines.runtime.tracking import Tracker, TrackingSettings
from pipelines.sweeping.settings import SweepSettings
from pipelines.sweeping.stage import best_of, concurrency, finished_rows, run_trial, sweep, sweep_identity
from pipelines.sweeping.table import row_of, write_table
from pipelines.sweeping.trials import Sections, grid
from pipelines.training.settings import TrainSettings
from pipelines.training.stage import train

TINY = Architecture(
    patch_size=1, encoder_depth=1, encoder_width=8, encoder_heads=2, decoder_depth=1, decoder_width=8, decoder_heads=2,
    buffer_size=2, denoiser_depth=1, denoiser_width=8,
)  # fmt: skip


def write_cache(path: str) -> None:
    """32 random latents of 2 channels on 2×2 in two classes."""
    moments, flipped = np.random.default_rng(0).normal(size=(2, 32, 4, 2, 2)).astype("float16")
    data = shard_bytes([f"{row:02d}.png" for row in range(32)], [row % 2 for row in range(32)], moments, flipped)
    storage.write_bytes(storage.join(path, "shards", shard_name(0)), data)
    found = LatentStatistics.of(moments).merged(LatentStatistics.of(flipped))
    manifest = Manifest(
        format_version=1, rows=32, shards=[{"name": shard_name(0), "rows": 32, "sha256": storage.digest(data), "bytes": len(data)}],
        class_names=["a", "b"], image_size=16, latent_size=2, latent_channels=2, dtype="float16", latent_mean=found.mean,
        latent_std=found.std, latent_min=found.min, latent_max=found.max, tokenizer={"path": "none", "digest": "0"}, images={}, rejected=0,
    )  # fmt: skip
    storage.write_json(storage.join(path, "manifest.json"), manifest.as_dict())


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> Sections:
    root = tmp_path_factory.mktemp("run")
    write_cache(str(root / "cache"))
    return Sections(
        Images(ImageSettings(size=16)),
        str(root / "tokenizer"),
        CacheSettings(path=str(root / "cache")),
        TINY,
        TrainSettings(
            path=str(root / "train"),
            images=64,
            batch=16,
            micro_batch=8,
            warmup_images=0,
            workers=1,
            log_images=16,
            checkpoint_images=64,
            failures=0,
        ),
        GenerateSettings(path=str(root / "samples")),
        EvaluateSettings(path=str(root / "evaluation")),
    )


def run(sections: Sections, settings: SweepSettings, stage: Stage) -> dict[str, Any]:
    return sweep(sections, settings, stage)


def test_the_grid_has_every_combination_with_its_own_configuration(sections: Sections) -> None:
    parameters = {"generate.temperature": [0.9, 1], "generate.guidance_schedule": ["linear", "constant"]}
    trials = grid(sections, SweepSettings(path="s", parameters=parameters, images=7))
    assert [trial.name for trial in trials] == [
        "temperature=0.9,guidance_schedule=linear",
        "temperature=0.9,guidance_schedule=constant",
        "temperature=1,guidance_schedule=linear",
        "temperature=1,guidance_schedule=constant",
    ]
    last = trials[-1].sections
    assert (last.generate.temperature, last.generate.guidance_schedule) == (1, "constant")
    assert last.evaluate.images == 7
    assert last.evaluate.path == "s/trials/temperature=1,guidance_schedule=constant/evaluation"
    assert last.train == sections.train
    assert sections.generate.temperature == 1.0
    trained = grid(sections, SweepSettings(path="s", over="train", parameters={"model.denoiser_width": [8, 16]}))
    assert [(one.sections.train.path, one.sections.model.denoiser_width) for one in trained] == [
        ("s/trials/denoiser_width=8", 8),
        ("s/trials/denoiser_width=16", 16),
    ]


@pytest.mark.parametrize(
    ("over", "parameters", "message"),
    [
        ("generate", {}, "sweep.parameters is empty"),
        ("generate", {"generate.temperatur": [1.0]}, "'generate.temperatur'.*nearest is 'generate.temperature'"),
        ("generate", {"train.learning_rate": [1e-3]}, "a sweep over generate takes the keys of generate"),
        ("train", {"train.path": ["a"]}, "'train.path'.*takes the keys of model and train"),
        ("generate", {"generate.temperature": []}, r"temperature is \[\], expected a list of one value or more"),
        ("generate", {"generate.ar_steps": [8, "many"]}, "the value 'many', expected int, as in 64"),
        ("generate", {"generate.limit_x0": [1]}, "the value 1, expected bool"),
        ("generate", {"generate.temperature": [0.9, 1.0, 0.9]}, "the trial temperature=0.9 twice, for .*; give other values"),
        ("train", {"train.init_from": ["a/b", "a:b"]}, "the trial init_from=a-b twice, for 'a/b' and 'a:b'"),
    ],
)
def test_a_parameter_that_cannot_be_swept_is_named(sections: Sections, over: Any, parameters: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid(sections, SweepSettings(over=over, parameters=parameters))


def test_concurrency_fits_the_cluster_and_too_many_workers_are_refused(sections: Sections, ray_local: ClusterSettings) -> None:
    def allowed(concurrent: int, workers: list[int], cluster: ClusterSettings = ray_local) -> int:
        settings = SweepSettings(
            over="train", metric="loss", parameters={"train.workers": workers, "train.batch": [16, 32, 64]}, concurrent=concurrent
        )
        return concurrency(grid(sections, settings), settings, cluster)

    assert allowed(0, [1]) == 2
    assert allowed(1, [1]) == 1
    assert allowed(8, [1]) == 2
    assert allowed(0, [1, 2]) == 1
    with pytest.raises(
        UserError,
        match=r"train.workers 3: 3 workers, each with 1 CPU and 0 GPU .* but the cluster has 2 CPUs and 0 GPUs; lower train.workers",
    ):
        allowed(0, [1, 3])
    with pytest.raises(UserError, match="has 2 CPUs and 0 GPUs"):
        allowed(0, [1], ClusterSettings(gpus_per_worker=1.0))
    assert allowed(0, [1, 3], ClusterSettings(autoscaling=True)) == 1


def test_identity_holds_what_decides_the_table_and_no_more(sections: Sections, tmp_path: Path) -> None:
    settings = SweepSettings(over="train", metric="loss", parameters={"model.denoiser_width": [8, 16]}, concurrent=3)
    found = sweep_identity(sections, settings, 1, ClusterSettings())
    assert found["train.images"] == 64
    assert "cache.digest" in found
    assert found["sweep.parameters"] == {"model.denoiser_width": [8, 16]}
    assert not {"model.denoiser_width", "sweep.concurrent", "train.workers", "generate.temperature"} & set(found)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(1280), sigma=np.eye(1280), network="efficientnet-lite0")
    elsewhere = tmp_path / "moved.npz"
    elsewhere.write_bytes((tmp_path / "reference.npz").read_bytes())
    settings = SweepSettings(over="train", metric="frechet_distance", parameters={"model.denoiser_width": [8]})

    def scored_against(reference: Path) -> dict[str, Any]:
        judged = replace(sections.evaluate, features="efficientnet-lite0", reference=str(reference))
        return sweep_identity(replace(sections, evaluate=judged), settings, 1, ClusterSettings())

    scored = scored_against(tmp_path / "reference.npz")
    assert scored == scored_against(elsewhere)  # what it is compared with, not where that lies
    assert "generate.guidance" in scored
    assert "evaluate.features" in scored
    assert not {"evaluate.images", "generate.images"} & set(scored)


def test_best_of_ignores_failed_trials() -> None:
    rows = [{"trial": "a", "metric": 2.0}, {"trial": "b", "metric": None}, {"trial": "c", "metric": 1.0}]
    assert best_of(rows, "min")["trial"] == "c"
    assert best_of(rows, "max")["trial"] == "a"
    assert best_of(rows[1:2], "min") is None
    assert best_of([*rows, {"trial": "d", "metric": math.nan}, {"trial": "e", "metric": -math.inf}], "min")["trial"] == "c"


def test_trials_train_a_failed_one_is_a_row_and_finished_ones_are_not_run_again(
    sections: Sections, ray_local: ClusterSettings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracking = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db")
    path = tmp_path / "sweep"
    parameters = {"model.decoder_width": [12, 9]}  # two heads don't divide 9
    settings = SweepSettings(path=str(path), over="train", metric="loss", parameters=parameters)
    parent = Tracker.open(tracking, "sweep", {}, str(path))
    summary = run(sections, settings, Stage("sweep", ray_local, start_tracking=lambda: parent))
    parent.close()

    good, bad = summary["rows"]
    trial = path / "trials" / "decoder_width=12"
    trained = json.loads((trial / "summary.json").read_text())
    assert (good["trial"], good["parameters"], good["error"]) == ("decoder_width=12", {"model.decoder_width": 12}, None)
    assert good["metric"] == trained["loss"]
    assert math.isfinite(good["metric"])
    assert trained["images_seen"] == 64
    assert (bad["trial"], bad["metric"], summary["failed"]) == ("decoder_width=9", None, 1)
    assert "decoder_heads is 2, expected a divisor of decoder_width, which is 9" in bad["error"]
    assert summary["best"] == {"trial": "decoder_width=12", "parameters": good["parameters"], "metric": good["metric"]}
    assert json.loads((trial / "trial.json").read_text()) == good
    assert json.loads((path / "table.json").read_text()) == summary["rows"]
    assert Image.open(path / "sweep.png").width > 600
    assert not (path / "ray").exists()
    shown = capfd.readouterr()
    assert not shown.out  # none of Tune's own tables
    assert "Traceback" not in shown.err

    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment).experiment_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    tracked = {one.info.run_name: one for one in nested}
    assert {name: one.info.status for name, one in tracked.items()} == {"decoder_width=12": "FINISHED", "decoder_width=9": "FAILED"}
    assert tracked["decoder_width=12"].data.params["model.decoder_width"] == "12"
    assert tracked["decoder_width=12"].data.metrics["loss"] == good["metric"]
    points = client.get_metric_history(tracked["decoder_width=12"].info.run_id, "learning_rate")
    assert [point.step for point in points] == [16, 32, 48, 64]

    # again: the finished trial is not touched, the failed one tried anew
    before = (trial / "trial.json").stat().st_mtime_ns
    again = run(sections, settings, Stage("sweep", ray_local))
    assert (trial / "trial.json").stat().st_mtime_ns == before
    assert again["rows"][0] == good
    assert again["rows"][1]["error"] == bad["error"]
    other = SweepSettings(path=str(path), over="train", metric="loss_band_0", parameters=parameters)
    with pytest.raises(UserError, match=r"sweep\.metric \(found 'loss', expected 'loss_band_0'\)"):
        run(sections, other, Stage("sweep", ray_local))


def test_a_training_that_diverged_never_wins(sections: Sections, ray_local: ClusterSettings, tmp_path: Path) -> None:
    """Steps of which none is finite have no loss in any band; the sweep of those that are left is decided without them."""
    path = tmp_path / "sweep"
    settings = SweepSettings(path=str(path), over="train", metric="loss_band_3", parameters={"train.learning_rate": [1e30, 1e-3]})
    summary = run(sections, settings, stage := Listening(ray_local))
    bad, good = summary["rows"]
    assert (bad["trial"], bad["metric"], good["error"], summary["failed"]) == ("learning_rate=1e+30", None, None, 1)
    assert bad["error"] == (
        "training diverged: no loss of its last interval is finite; 3 of 4 steps (75.0%) were skipped because a loss or gradient was not "
        "finite"
    )
    assert (bad["metrics"]["steps"], bad["metrics"]["steps_skipped"], good["metrics"]["steps_skipped"]) == (4, 3, 0)
    assert math.isnan(bad["metrics"]["loss_band_3"])
    assert summary["best"] == {"trial": "learning_rate=0.001", "parameters": {"train.learning_rate": 1e-3}, "metric": good["metric"]}
    assert 0.1 < good["metric"] < 10
    assert f"learning_rate=1e+30 failed: {bad['error']}" in stage.said
    assert stage.said[-1].startswith("best: learning_rate=0.001 with loss_band_3 ")

    trial = path / "trials" / "learning_rate=1e+30"
    lines = [strict_json(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_share"] for line in lines] == [0.0, 1.0, 1.0, 1.0]
    assert [line["loss_band_3"] is None for line in lines] == [line["gradient_norm"] is None for line in lines] == [False, True, True, True]
    assert strict_json((trial / "summary.json").read_text())["loss"] is None
    assert strict_json((path / "table.json").read_text())[0]["metrics"]["loss"] is None
    assert strict_json((path / "summary.json").read_text())["rows"][0]["metrics"]["loss_band_0"] is None
    with open(path / "table.csv", newline="") as file:
        assert [row["loss_band_3"] == "nan" for row in csv.DictReader(file)] == [True, False]

    # `mar train` prints it too, and resumes from a checkpoint whose lines hold null
    (trial / "summary.json").unlink()
    one = grid(sections, settings)[0].sections
    trained = train(one.tokenizer_path, one.cache, one.model, one.train, stage)
    assert math.isnan(trained["loss"])
    assert stage.said[-1] == f"{bad['error']}; lower train.learning_rate in a run with another train.path"

    # whatever the metric is: nothing is drawn with such weights
    scored = replace(settings, metric="frechet_distance")
    trials = {one.name: one for one in grid(sections, scored)}
    outcome = run_trial({"trial": "learning_rate=1e+30"}, trials, scored, 0, ray_local)["outcome"]
    assert outcome["error"] == bad["error"]

    # a row that an earlier version wrote for such a trial does not stay
    (trial / "trial.json").write_text(json.dumps({**bad, "metric": 0.0, "error": None, "metrics": {"loss_band_3": 0.0}}))
    assert list(finished_rows(grid(sections, settings), settings, stage).values()) == [good]


def strict_json(text: str) -> Any:
    """What a reader that knows no NaN makes of it."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_every_trial_failed(sections: Sections, ray_local: ClusterSettings, tmp_path: Path) -> None:
    settings = SweepSettings(path=str(tmp_path), over="train", metric="loss", parameters={"model.decoder_width": [9]})
    with pytest.raises(UserError, match=r"every trial of .* failed \(decoder_width=9: .*expected a divisor of decoder_width"):
        run(sections, settings, Stage("sweep", ray_local))


@pytest.mark.parametrize(
    ("over", "metric", "message"),
    [
        ("generate", "loss", "'loss'; a sweep over generate measures frechet_distance, fid"),
        ("train", "label_agreement", "label_agreement needs evaluate.classifier"),
        ("generate", "fid", r"train\.path .* contains no checkpoint; run `mar train`"),
        ("train", "fid", r"sweep\.images is 1, expected 2 or more"),
    ],
)
def test_what_a_sweep_needs_is_checked_first(
    sections: Sections, ray_local: ClusterSettings, tmp_path: Path, over: Any, metric: str, message: str
) -> None:
    parameters = {"generate.temperature": [0.9]} if over == "generate" else {"model.denoiser_width": [8]}
    images = 1 if "sweep.images" in message.replace("\\", "") else 1000
    settings = SweepSettings(path=str(tmp_path), over=over, metric=metric, parameters=parameters, images=images)
    with pytest.raises(UserError, match=message):
        run(sections, settings, Stage("sweep", ray_local))


@pytest.mark.long  # the journey of tests/e2e sweeps over generation too
def test_a_sweep_over_generation_draws_from_one_checkpoint_and_trains_nothing(ray_local: ClusterSettings, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer)
    sections = Sections(
        Images(ImageSettings(source=write_images(tmp_path / "images", 4), size=32, held_out_folder="held_out")),
        tokenizer,
        CacheSettings(path=str(tmp_path / "cache")),
        TINY,
        TrainSettings(path=str(tmp_path / "train")),
        GenerateSettings(checkpoint=checkpoint, ar_steps=2, diffusion_steps=3, guidance=1.0),
        EvaluateSettings(features="efficientnet-lite0"),
    )
    settings = SweepSettings(path=str(tmp_path / "sweep"), parameters={"generate.temperature": [0.5, 1.0]}, images=6)
    summary = run(sections, settings, stage := Listening(ray_local))
    first, second = summary["rows"]
    assert [first["trial"], second["trial"]] == ["temperature=0.5", "temperature=1.0"]
    assert first["error"] is second["error"] is None
    assert first["metric"] == first["metrics"]["frechet_distance_efficientnet-lite0"] > 0
    assert first["metric"] != second["metric"]
    assert summary["best"]["metric"] == min(first["metric"], second["metric"])
    assert summary["caution"] == first["caution"] == second["caution"]
    assert first["caution"].startswith("warning: 6 samples and 12 reference images are far too few")
    assert stage.said[-1] == summary["caution"]
    assert len(list((tmp_path / "sweep" / "reference").glob("reference-*.npz"))) == 1  # computed once, for all trials
    record = json.loads((tmp_path / "sweep" / "trials" / "temperature=0.5" / "evaluation" / "evaluation.json").read_text())
    assert (record["images"], record["generation"]["temperature"], record["generation"]["checkpoint"]) == (6, 0.5, checkpoint)
    assert not (tmp_path / "train").exists()


def test_a_row_carries_the_caution_of_its_evaluation(sections: Sections, tmp_path: Path) -> None:
    [trial] = grid(sections, SweepSettings(path="s", parameters={"generate.temperature": [0.9]}))
    metrics = {"fid": 12.5, "images": 30, "reference_images": None, "features": "inception", "caution": "warning: 30 samples are too few"}
    row = row_of(trial, {"metrics": metrics, "seconds": 1.0, "error": None}, "fid")
    assert (row["metric"], row["caution"], row["metrics"]["images"]) == (12.5, "warning: 30 samples are too few", 30)
    write_table(str(tmp_path), [row])
    with open(tmp_path / "table.csv", newline="") as file:
        [read] = csv.DictReader(file)
    assert (read["fid"], read["reference_images"], read["caution"]) == ("12.5", "nan", "warning: 30 samples are too few")
    for value, error in ((math.nan, "sweep.metric fid is nan"), (math.inf, "sweep.metric fid is inf")):
        row = row_of(trial, {"metrics": {"fid": value}, "seconds": 1.0, "error": None}, "fid")
        assert (row["metric"], row["error"]) == (None, error)
    assert "is not among its metrics: images" in row_of(trial, {"metrics": {"images": 3}, "seconds": 1.0, "error": None}, "fid")["error"]


def test_table_and_plot_of_two_parameters(tmp_path: Path) -> None:
    rows = [
        {
            "trial": f"{rate}-{schedule}",
            "parameters": {"train.learning_rate": rate, "train.schedule": schedule},
            "metric": None if rate == 1e-2 else 1 + rate,
            "metrics": {} if rate == 1e-2 else {"loss": 1 + rate},
            "seconds": 2.5,
            "error": "out of memory, sorry" if rate == 1e-2 else None,
        }
        for rate in (1e-4, 1e-3, 1e-2)
        for schedule in ("constant", "cosine")
    ]
    write_table(str(tmp_path), rows)
    picture = Image.open(io.BytesIO(sweep_plot(rows, "loss", "0.0001-cosine")))
    with open(tmp_path / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert read[1] == {
        "trial": "0.0001-cosine", "train.learning_rate": "0.0001", "train.schedule": "cosine", "loss": "1.0001", "seconds": "2.5",
        "caution": "", "error": "",
    }  # fmt: skip
    assert read[5]["loss"] == ""
    assert read[5]["error"] == "out of memory, sorry"
    assert picture.format == "PNG"
    assert picture.size == (864, 384)
