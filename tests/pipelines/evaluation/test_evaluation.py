from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from listening import Listening
from tiny_run import CLASSES, SIZE, write_checkpoint, write_images, write_tokenizer

from mar_model.tokenizers import load_tokenizer
from pipelines.evaluation.classifier.network import check_classes, classifier_digest, load_classifier
from pipelines.evaluation.classifier.training import train_classifier
from pipelines.evaluation.comparison import frechet_rows
from pipelines.evaluation.features import EfficientNetLite0, network_digest
from pipelines.evaluation.image_sets.sets import NoiseImages
from pipelines.evaluation.metrics.inception_score import inception_score
from pipelines.evaluation.metrics.kid import kernel_distance
from pipelines.evaluation.metrics.precision_recall import precision_recall
from pipelines.evaluation.references.find import find_reference
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.stage import evaluate, with_reference
from pipelines.evaluation.statistics import FeatureStatistics, FeatureSums, frechet_distance
from pipelines.generation import samples
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import Images, list_images
from pipelines.images.pixels import decode, to_model, to_uint8
from pipelines.images.reading import read_image
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.settings import TokenizerSettings

NAME = "frechet_distance_efficientnet-lite0"
HELD_OUT, DRAWN = 8 * len(CLASSES), 30


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_local: ClusterSettings) -> dict:
    """One evaluation of 30 samples against 24 held-out images, with a classifier."""
    root = tmp_path_factory.mktemp("run")
    stage = Listening(ray_local, seed=3)
    images = Images(ImageSettings(source=write_images(root / "images"), size=SIZE, held_out_folder="held_out"))
    trained = train_classifier(images, str(root / "classifier"), stage)
    tokenizer = TokenizerSettings(path=write_tokenizer(root / "tokenizer"))
    checkpoint = write_checkpoint(root / "checkpoint", tokenizer.path)
    sections = {
        "images": images,
        "tokenizer_path": tokenizer.path,
        "train_path": str(root / "train"),
        "generate": GenerateSettings(checkpoint=checkpoint, ar_steps=4, diffusion_steps=4, batch=8, precision="float32"),
        "evaluate": EvaluateSettings(
            path=str(root / "evaluation"),
            images=DRAWN,
            features="efficientnet-lite0",
            classifier=str(root / "classifier"),
            batch=7,
        ),
        "stage": stage,
    }
    return {**sections, "classifier": trained, "summary": evaluate(**sections)}


def sections(run: dict, **evaluate_changes: object) -> dict:
    rest = {name: value for name, value in run.items() if name not in ("classifier", "summary")}
    return {**rest, "evaluate": replace(run["evaluate"], **evaluate_changes)}


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0(torch.device("cpu"))


def statistics(network: EfficientNetLite0, images: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics.of(FeatureSums.of(network(images)), network.name, network.digest)


def drawn(path: str) -> np.ndarray:
    return np.concatenate([samples.read_samples(path, *shard).images for shard in samples.shards_there(path)])


def real(images: ImageSettings, held_out: bool) -> np.ndarray:
    listing = list_images(images)
    return np.stack([decode(read_image(images, row), SIZE) for row in (listing.held_out() if held_out else listing.train())])


def distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    return frechet_distance(one.mu, one.sigma, other.mu, other.sigma)


def test_the_record_is_what_its_images_give_in_one_piece(run: dict, network: EfficientNetLite0) -> None:
    """Streamed through Ray in blocks = all features at once."""
    path = run["evaluate"].path
    record = storage.read_json(f"{path}/evaluation.json")
    whole, held_out = statistics(network, drawn(path)), statistics(network, real(run["images"].settings, held_out=True))
    expected = distance(whole, held_out)
    assert record["metrics"][NAME] == pytest.approx(expected, rel=1e-4)
    assert run["summary"][NAME] == run["summary"]["frechet_distance"] == record[NAME] == record["metrics"][NAME]
    first = statistics(network, drawn(path)[:HELD_OUT])
    assert record["at_equal_numbers"] == {"images": HELD_OUT, NAME: pytest.approx(distance(first, held_out), rel=1e-4)}

    saved = FeatureStatistics.load(f"{path}/statistics.npz")
    np.testing.assert_allclose(saved.sigma, whole.sigma, atol=1e-5 * np.abs(whole.sigma).max())
    assert (saved.count, saved.network, saved.digest) == (DRAWN, "efficientnet-lite0", network.digest)
    assert record["reference"]["images"] == HELD_OUT
    assert record["network"] == {"name": "efficientnet-lite0", "digest": network.digest}
    assert "fid" not in record["metrics"]
    assert set(record["definitions"]) == set(record["metrics"])
    assert record["seconds_per_image"] > 0
    names = {"frechet_distance", "spatial_frechet_distance", "class_score_mean", "class_score_std", "kernel_distance_mean",
             "kernel_distance_std", "precision", "recall"}  # fmt: skip
    assert set(record["metrics"]) == {f"{name}_efficientnet-lite0" for name in names} | {"label_agreement"}
    assert record["format_version"] == 2
    whole_set, reference_set = network.features(drawn(path)), network.features(real(run["images"].settings, held_out=True))
    spatial = [FeatureSums.of(one.spatial).moments() for one in (whole_set, reference_set)]
    expected = {
        "spatial_frechet_distance": frechet_distance(*spatial[0], *spatial[1]),
        "class_score_mean": inception_score(whole_set.logits)[0],
        "kernel_distance_mean": kernel_distance(whole_set.pooled, reference_set.pooled, size=HELD_OUT)[0],
        "precision": precision_recall(whole_set.pooled, reference_set.pooled)[0],
        "recall": precision_recall(whole_set.pooled, reference_set.pooled)[1],
    }
    for name, value in expected.items():
        assert record["metrics"][f"{name}_efficientnet-lite0"] == pytest.approx(value, rel=1e-3), name
    assert all(error >= 0 for error in record["standard_errors"].values())
    assert "subset size 24" in record["definitions"]["kernel_distance_mean_efficientnet-lite0"]
    assert record["generation"]["ar_steps"] == 4
    assert Path(path, "samples.png").is_file()


def test_numbers_of_few_images_are_marked_in_the_terminal_and_the_record(run: dict) -> None:
    path = run["evaluate"].path
    distance_of_few = (
        "warning: 30 samples and 24 reference images are far too few: below 300 images most of a Fréchet distance is the error of its "
        "estimate; draw no conclusion from it"
    )
    agreement_of_few = "caution: the label agreement of 30 samples has a standard error of up to 9 percentage points"
    assert [line for line in run["stage"].said if line in (distance_of_few, agreement_of_few)] == [distance_of_few, agreement_of_few]
    for found in (run["summary"], storage.read_json(f"{path}/evaluation.json"), storage.read_json(f"{path}/summary.json")):
        assert found["caution"] == f"{distance_of_few}; {agreement_of_few}"


@pytest.mark.parametrize("images", [0, 1])
def test_a_single_sample_is_refused_before_any_is_drawn(run: dict, tmp_path: Path, images: int) -> None:
    with pytest.raises(UserError, match=rf"evaluate\.images is {images}, expected 2 or more: one image has no covariance"):
        evaluate(**sections(run, images=images, path=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_reference_images_that_cannot_be_used_are_counted(run: dict, tmp_path: Path) -> None:
    images = Images(replace(run["images"].settings, source=write_images(tmp_path / "images", per_class=2)))
    files = sorted((tmp_path / "images" / "held_out").rglob("*.png"))
    stage = Listening(run["stage"].cluster)

    def reference_of(folder: str) -> FeatureStatistics:
        settings = replace(run["evaluate"], path=str(tmp_path / folder))
        prepared = with_reference(images, run["tokenizer_path"], settings, stage)
        return FeatureStatistics.load(prepared.reference)

    files[0].write_bytes(b"no image")
    assert reference_of("one").count == 5
    assert stage.said == ["1 of 6 images to compare with can't be used and are left out of the statistics"]
    for file in files[:-1]:
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 6 images to compare with can be used, expected 2 or more"):
        reference_of("five")


def test_the_classifier_is_judged_by_the_images_that_can_be_used(run: dict, tmp_path: Path) -> None:
    images = Images(replace(run["images"].settings, source=write_images(tmp_path / "images", per_class=4), max_rejected=0.5))
    for file in sorted((tmp_path / "images" / "held_out").rglob("*.png"))[:5]:
        file.write_bytes(b"no image")
    trained = train_classifier(images, str(tmp_path / "classifier"), run["stage"])
    assert (trained["images"], trained["images_held_out"]) == (12, 7)
    assert (7 * trained["accuracy_held_out"]) % 1 == pytest.approx(0)


def test_the_classifier_on_disk_is_the_one_that_was_measured(run: dict) -> None:
    path, trained = run["evaluate"].classifier, run["classifier"]
    assert (trained["images"], trained["images_held_out"]) == (HELD_OUT, HELD_OUT)
    right = load_classifier(path).predict(real(run["images"].settings, held_out=True)) == np.repeat(np.arange(3), 8)
    assert trained["accuracy_held_out"] == right.mean()
    assert train_classifier(run["images"], path, run["stage"]) == trained
    assert classifier_digest(path) == storage.digest(Path(path, "classifier.safetensors").read_bytes())
    with pytest.raises(UserError, match="knows 3 classes, the checkpoint 10"):
        check_classes(path, 10)


def test_label_agreement_counts_what_the_classifier_says(run: dict) -> None:
    predicted = load_classifier(run["evaluate"].classifier).predict(drawn(run["evaluate"].path))
    assert run["summary"]["label_agreement"] == pytest.approx(np.mean(predicted == np.arange(DRAWN) % 3))


def test_again_it_is_complete_and_after_a_kill_it_goes_on(run: dict) -> None:
    path = Path(run["evaluate"].path)
    assert evaluate(**sections(run)) == run["summary"]
    written = {file.name: file.stat().st_mtime_ns for file in (path / "shards").iterdir()}
    references = list(path.glob("reference-*.npz"))
    assert len(references) == 2  # the held-out images, and as many samples
    for name in ("summary.json", "evaluation.json", "shards/samples-00000008-00000016.parquet"):
        (path / name).unlink()
    again = evaluate(**sections(run))
    assert again["images"] == DRAWN
    assert again[NAME] == pytest.approx(run["summary"][NAME], rel=1e-6)
    assert {name for name, when in written.items() if (path / "shards" / name).stat().st_mtime_ns != when} == {
        "samples-00000008-00000016.parquet"
    }
    with pytest.raises(UserError, match=r"evaluate\.images \(found 30, expected 31\)"):
        evaluate(**sections(run, images=31))


def test_rows_compare_equal_numbers(run: dict, network: EfficientNetLite0) -> None:
    count = 18
    rows = frechet_rows(run["images"], run["evaluate"], count, run["stage"], run["tokenizer_path"])
    in_turn = np.concatenate([np.arange(6) + 8 * label for label in range(3)])  # six of eight a class
    held_out = statistics(network, real(run["images"].settings, held_out=True)[in_turn])
    train = real(run["images"].settings, held_out=False)[in_turn]
    tokenizer = load_tokenizer(Path(run["tokenizer_path"]))
    with torch.inference_mode():
        reconstructed = to_uint8(tokenizer.decode(tokenizer.moments(to_model(train)).chunk(2, dim=1)[0]))
    expected = {
        "reconstructed": reconstructed,
        "generated": drawn(run["evaluate"].path)[:count],
        "real_train": train,
        "noise": NoiseImages(count, SIZE, run["stage"].seed).read(0, count),
    }
    assert rows == {name: pytest.approx(distance(statistics(network, images), held_out), rel=1e-4) for name, images in expected.items()}
    assert rows["real_train"] < rows["noise"]
    assert list(rows) == ["real_train", "reconstructed", "generated", "noise"]
    assert frechet_rows(run["images"], run["evaluate"], count, run["stage"], run["tokenizer_path"]) == rows
    with pytest.raises(UserError, match="24 images held out, expected 25"):
        frechet_rows(run["images"], run["evaluate"], 25, run["stage"])


def test_references_a_person_can_name(run: dict, tmp_path: Path) -> None:
    digest = network_digest("efficientnet-lite0", "")
    prepared = with_reference(run["images"], run["tokenizer_path"], run["evaluate"], run["stage"])
    loaded = find_reference(run["images"], run["tokenizer_path"], prepared, digest)
    assert isinstance(loaded, FeatureStatistics)
    assert loaded.count == HELD_OUT

    whole = find_reference(
        run["images"], run["tokenizer_path"], replace(run["evaluate"], reference=f"{run['images'].settings.source}/train"), digest
    )
    assert len(whole) == 8 * len(CLASSES)

    with pytest.raises(UserError, match=r"1280 features of efficientnet-lite0 .* expected 2048 of inception"):
        find_reference(run["images"], run["tokenizer_path"], replace(prepared, features="inception"), digest)
    with pytest.raises(UserError, match=r"expected 1280 of efficientnet-lite0 \(ffff"):
        find_reference(run["images"], run["tokenizer_path"], prepared, "f" * 64)
    adm = tmp_path / "adm.npz"
    np.savez(adm, mu=np.zeros(2048), sigma=np.eye(2048))
    inception = replace(prepared, features="inception", reference=str(adm))
    assert find_reference(run["images"], run["tokenizer_path"], inception, "any").count is None
    with pytest.raises(UserError, match=r"nothing of images\.source .* is held out"):
        find_reference(
            Images(ImageSettings(source=f"{run['images'].settings.source}/train", size=SIZE)),
            run["tokenizer_path"],
            run["evaluate"],
            digest,
        )


def test_missing_weights_and_gpus_are_said_before_anything_starts(run: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.weights is not set: download https://github\.com/toshas"):
        evaluate(**sections(run, features="inception", path=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    gpus = Stage("evaluate", replace(run["stage"].cluster, gpus_per_worker=0.5))
    with pytest.raises(UserError, match=r"generate\.actors 1: .* 0\.5 GPU .* the cluster has 2 CPUs and 0 GPUs"):
        evaluate(**{**sections(run, path=str(tmp_path / "out")), "stage": gpus})
