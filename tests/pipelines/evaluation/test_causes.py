"""Metrics by class and nearest training images, of features on disk: against numpy and scipy."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist

from pipelines.evaluation.causes.by_class import TO_CLASS, TO_WHOLE, by_class
from pipelines.evaluation.causes.nearest import NEIGHBOURS, TrainingImages
from pipelines.evaluation.causes.pictures import MOST_SIDE, write_rows
from pipelines.evaluation.features.sizes import Features
from pipelines.evaluation.metrics.class_means import ClassMeans
from pipelines.evaluation.metrics.precision_recall import TILE
from pipelines.evaluation.reference_file import Reference
from pipelines.evaluation.scoring.class_sums import class_means
from pipelines.evaluation.scoring.feature_shards import FeatureShard, KeptFeatures, write_shard
from pipelines.evaluation.scoring.tasks import Tasks

HERE = Tasks(here=True)
NAMES = ["ant", "bee", "cat"]


def kept_features(path: Path, pooled: np.ndarray, label: np.ndarray, predicted: np.ndarray | None = None, batch: int = 7) -> KeptFeatures:
    ranges = [(start, min(start + batch, len(pooled))) for start in range(0, len(pooled), batch)]
    for start, stop in ranges:
        rows, index = slice(start, stop), np.arange(start, stop)
        said = np.full(stop - start, -1) if predicted is None else predicted[rows]
        empty = np.zeros((stop - start, 1))
        write_shard(str(path), FeatureShard(start, stop, index, label[rows], said, Features(pooled[rows], empty, empty)))
    return KeptFeatures(str(path), tuple(ranges))


def reference(names: list[str], means: ClassMeans) -> Reference:
    return Reference((np.full(4, 0.5), np.eye(4)), classes=(names, means))


def test_class_means_are_those_of_all_images_of_the_class(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pooled, label = generator.normal(size=(40, 4)).astype(np.float32), generator.integers(-1, 3, 40)
    found = class_means(kept_features(tmp_path, pooled, label), np.array([7] * 5 + [5]), label, 5, HERE)
    for number in range(3):
        own = pooled[label == number].astype(np.float64)
        assert found.counts[number] == len(own)
        np.testing.assert_allclose(found.means[number], own.mean(axis=0), rtol=1e-9)
        assert found.noise[number] == pytest.approx(np.trace(np.cov(own.T)) / len(own), rel=1e-9)
    assert np.isnan(found.means[3:]).all()
    assert np.isnan(found.noise[3:]).all()


def test_the_distance_of_means_does_not_grow_with_fewer_images() -> None:
    generator = np.random.default_rng(1)
    shift, few, trials = np.array([1.0, 0.0, 0.0, 0.5]), 3, 4000
    sets = [generator.normal(size=(trials, few, 4)) for _ in range(2)]
    sets[1] += shift
    one, other = (ClassMeans(np.full(trials, few), values.mean(axis=1), values.var(axis=1, ddof=1).sum(axis=1) / few) for values in sets)
    plain = np.square(one.means - other.means).sum(axis=1).mean()
    assert plain > 3.5  # 1.25 and the noise of two means
    assert one.distances(other).mean() == pytest.approx(1.25, abs=0.15)
    assert other.distances_to(np.zeros(4)).mean() == pytest.approx(1.25, abs=0.1)


def test_classes_are_ranked_by_the_distance_to_their_own_reference(tmp_path: Path) -> None:
    label = np.arange(30) % 3
    pooled = np.eye(4, dtype=np.float32)[label] + np.array([0.0, 2.0, 1.0], np.float32)[label][:, None]
    predicted = np.where(np.arange(30) < 6, 0, label)
    inside = np.arange(30) % 2 == 0
    kept = kept_features(tmp_path / "features", pooled, label, predicted)
    own = ClassMeans(np.full(3, 10), np.eye(4)[:3], np.zeros(3))
    found = by_class(kept, inside, reference(NAMES, own), NAMES, HERE)
    assert found.distance_to == TO_CLASS
    np.testing.assert_allclose(found.values["distance_of_means"], [0, 16, 4], atol=1e-6)
    np.testing.assert_allclose(found.values["precision"], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(found.values["label_agreement"], [1.0, 0.8, 0.8])
    assert found.ranked_by() == "distance_of_means"
    assert found.ranking().tolist() == [0, 2, 1]
    assert found.ends() == ([0], [1])
    found.save(str(tmp_path / "by_class.csv"))
    rows = list(csv.DictReader((tmp_path / "by_class.csv").open()))
    assert [row["class"] for row in rows] == NAMES
    assert [float(row["distance_of_means"]) for row in rows] == pytest.approx([0, 16, 4], abs=1e-6)

    other = by_class(kept, None, reference(["ant", "cat", "dog"], own), NAMES, HERE)  # the same numbers of other classes
    assert other.distance_to == TO_WHOLE
    np.testing.assert_allclose(other.values["distance_of_means"], [1.0, 13.0, 3.0], atol=1e-6)
    assert other.ranked_by() == "label_agreement"
    assert np.isnan(other.values["precision"]).all()
    assert other.record()["best"][0]["precision"] is None
    with pytest.raises(ValueError, match="the samples have no labels"):
        by_class(kept_features(tmp_path / "unknown", pooled, np.full(30, -1)), None, reference(NAMES, own), [], HERE)


def test_nearest_training_images_are_those_of_all_pairs(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    training = generator.normal(size=(TILE + 60, 4)).astype(np.float32)
    samples = np.concatenate([generator.normal(size=(TILE, 4)), training[-2:], training[:2] + 1e-3]).astype(np.float32)
    known = TrainingImages(training, HERE)
    found = known.nearest_to_kept(kept_features(tmp_path, samples, np.zeros(len(samples), np.int64), batch=500))
    distances = cdist(samples.astype(np.float64), training.astype(np.float64))
    order = np.argsort(distances, axis=1)[:, :NEIGHBOURS]
    np.testing.assert_array_equal(found.rows, order)
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances, order, 1), atol=1e-6)
    own = cdist(training.astype(np.float64), training.astype(np.float64))
    np.fill_diagonal(own, np.inf)
    np.testing.assert_allclose(found.spacing, own.min(axis=1)[order[:, 0]], rtol=1e-6)
    assert found.closer.mean() == np.mean(distances.min(axis=1) < own.min(axis=1)[order[:, 0]])
    assert found.same[TILE:].all()  # two copies, and two that differ in the third digit
    assert found.same[:TILE].sum() == 0
    np.testing.assert_array_equal(known.nearest_to(samples).rows, found.rows)
    with pytest.raises(ValueError, match="3 training images can be used, expected more than 3"):
        TrainingImages(training[:3], HERE)


@pytest.mark.parametrize(("side", "shown"), [(32, 64), (100, 100), (256, MOST_SIDE)])
def test_a_picture_of_rows_divides_into_its_rows(tmp_path: Path, side: int, shown: int) -> None:
    shades = [[10, 60], [110], [160, 210]]
    rows = [[np.full((side, side, 3), shade, np.uint8) for shade in row] for row in shades]
    write_rows(str(tmp_path / "rows.png"), [*rows, [None, rows[0][0]]])
    picture = np.asarray(Image.open(tmp_path / "rows.png"))
    assert picture.shape == (4 * (shown + 2), 2 * (shown + 2), 3)
    for part, row in zip(np.split(picture, 4), shades, strict=False):
        assert [int(part[shown // 2, x * (shown + 2) + shown // 2, 0]) for x in range(len(row))] == row
