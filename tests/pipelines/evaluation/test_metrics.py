import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.numpy import save_file
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipelines.evaluation.metrics import inception_score, kid, precision_recall, uncertainty
from pipelines.evaluation.metrics.frechet import FrechetReference
from pipelines.evaluation.statistics import FeatureStatistics, FeatureSums, frechet_distance
from pipelines.runtime.errors import UserError


def features(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(3.0, 1.0, (count, dimension)) @ generator.normal(0.0, 1.0, (dimension, dimension))).astype(np.float32)


def sums_of(values: np.ndarray, blocks: list[int]) -> FeatureSums:
    sums = FeatureSums(values.shape[1])
    for block in np.split(values, np.cumsum(blocks)[:-1]):
        sums.merge(FeatureSums.of(block))
    return sums


@pytest.mark.parametrize("blocks", [[211], [1, 200, 10], [64, 64, 64, 19]])
def test_streamed_statistics_are_those_of_numpy(blocks: list[int]) -> None:
    values = features(211, 24)
    statistics = FeatureStatistics.of(sums_of(values, blocks), "net", "digest")
    np.testing.assert_allclose(statistics.mu, values.astype(np.float64).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(statistics.sigma, np.cov(values.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-10)
    assert statistics.count == 211


def test_merging_in_another_order_changes_nothing_but_the_last_bits() -> None:
    blocks = np.split(features(96, 12), 6)
    forward, backward = FeatureSums(12), FeatureSums(12)
    for block in blocks:
        forward.merge(FeatureSums.of(block))
    for block in reversed(blocks):
        backward.merge(FeatureSums.of(block))
    np.testing.assert_allclose(forward.outer, backward.outer, rtol=1e-14)
    again = sums_of(np.concatenate(blocks), [16] * 6)
    np.testing.assert_array_equal(forward.outer, again.outer)


def test_one_image_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="1 image"):
        FeatureStatistics.of(FeatureSums.of(features(1, 3)), "net", "digest")


def test_frechet_distance_is_that_of_scipys_matrix_square_root() -> None:
    one, two = features(400, 32, seed=1).astype(np.float64), features(300, 32, seed=2).astype(np.float64) + 0.5
    mu1, mu2, s1, s2 = one.mean(0), two.mean(0), np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu2, s2, mu1, s1) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu1, s1, mu1, s1) == pytest.approx(0.0, abs=1e-7 * np.trace(s1))


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Covariances that commute: |μ₁ − μ₂|² + Σ (√λ₁ − √λ₂)²."""
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))[0]
    first, second = np.array([4.0, 1.0, 0.25, 9.0, 0.0]), np.array([1.0, 1.0, 4.0, 0.0, 0.0])
    s1, s2 = (rotation * first) @ rotation.T, (rotation * second) @ rotation.T
    mu1, mu2 = np.zeros(5), np.array([3.0, 4.0, 0.0, 0.0, 0.0])
    expected = 25.0 + 1.0 + 0.0 + 2.25 + 9.0 + 0.0
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_with_fewer_images_than_dimensions() -> None:
    """Rank 19 in 64 dimensions, where a general matrix square root is singular: features in a subspace keep their distance."""
    one, two = features(20, 8, seed=4).astype(np.float64), features(20, 8, seed=5).astype(np.float64)
    basis = np.linalg.qr(np.random.default_rng(6).normal(size=(64, 8)))[0]
    low = frechet_distance(one.mean(0), np.cov(one, rowvar=False), two.mean(0), np.cov(two, rowvar=False))
    one, two = one @ basis.T, two @ basis.T
    high = frechet_distance(one.mean(0), np.cov(one, rowvar=False), two.mean(0), np.cov(two, rowvar=False))
    assert high == pytest.approx(low, rel=1e-9)


def test_statistics_files_ours_and_adms(tmp_path) -> None:
    statistics = FeatureStatistics.of(FeatureSums.of(features(30, 6)), "efficientnet-lite0", "abc")
    path = str(tmp_path / "ours.npz")
    statistics.save(path)
    loaded = FeatureStatistics.load(path)
    np.testing.assert_array_equal(loaded.sigma, statistics.sigma)
    assert (loaded.count, loaded.network, loaded.digest) == (30, "efficientnet-lite0", "abc")

    adm = tmp_path / "adm.npz"
    np.savez(adm, mu=statistics.mu, sigma=statistics.sigma, mu_s=np.zeros(2), sigma_s=np.zeros((2, 2)))
    loaded = FeatureStatistics.load(str(adm))
    np.testing.assert_array_equal(loaded.mu, statistics.mu)
    assert (loaded.count, loaded.network, loaded.digest) == (None, None, None)


def test_statistics_files_that_are_none(tmp_path) -> None:
    with pytest.raises(UserError, match="not there"):
        FeatureStatistics.load(str(tmp_path / "missing.npz"))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(4), sigma=np.zeros((3, 3)))
    with pytest.raises(UserError, match=r"sigma.*\(3, 3\).*expected mu \(D,\) and sigma \(D, D\)"):
        FeatureStatistics.load(str(tmp_path / "odd.npz"))
    mu, sigma = np.zeros(4), np.eye(4)
    np.savez(tmp_path / "nan.npz", mu=mu, sigma=np.where(sigma, np.nan, 0.0))
    with pytest.raises(UserError, match=r"nan\.npz is damaged: sigma holds values that are not finite"):
        FeatureStatistics.load(str(tmp_path / "nan.npz"))
    np.savez(tmp_path / "one.npz", mu=mu, sigma=sigma, count=1)
    with pytest.raises(UserError, match=r"one\.npz holds statistics of 1 image\(s\), expected 2 or more"):
        FeatureStatistics.load(str(tmp_path / "one.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"can't be read as \.npz"):
        FeatureStatistics.load(str(tmp_path / "text.npz"))


def test_inception_score_is_torch_fidelitys() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (137, 40)).astype(np.float32)
    for shuffled in (True, False):
        expected = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=shuffled, rng_seed=2020)
        mean, std = inception_score.inception_score(logits, shuffled)
        assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
        assert std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_scores_merge_and_leave_groups_out() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (60, 12))
    groups = np.arange(60) % 3
    sums = inception_score.ScoreSums.of(logits[:25], groups[:25], 3)
    sums.merge(inception_score.ScoreSums.of(logits[25:], groups[25:], 3))
    whole = [inception_score.ScoreSums.of(logits[groups != one], np.zeros(40, int), 1).scores()[0] for one in range(3)]
    np.testing.assert_allclose(sums.scores_without(), whole, rtol=1e-12)


def test_kernel_distance_is_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = features(90, 24, seed=1) / 9, features(70, 24, seed=2) / 9 + 0.1
    about = {"kid_subsets": 12, "kid_subset_size": 50, "rng_seed": 2020, "verbose": False}
    expected = kid_features_to_metric(torch.from_numpy(one).double(), torch.from_numpy(two).double(), **about)
    mean, std = kid.kernel_distance(one, two, 12, 50)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], abs=1e-6)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], abs=1e-6)
    monkeypatch.setattr(kid, "FEW", 10)
    assert kid.kernel_distance(one, two, 12, 50) == pytest.approx((mean, std), rel=1e-9)
    with pytest.raises(ValueError, match="subsets of 80 images, of sets of 90 and 70"):
        kid.kernel_distance(one, two, 12, 80)


@pytest.mark.parametrize("tile", [7, 32, 2048])
def test_precision_and_recall_are_torch_fidelitys_in_any_tiles(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    one, two = generator.normal(0, 1, (83, 6)), generator.normal(0.8, 1, (60, 6))
    one[10:15] = one[9]  # duplicates: five images at distance 0 from each other
    expected = prc_features_to_metric(torch.from_numpy(one), torch.from_numpy(two), save_cpu_ram=False, verbose=False)
    monkeypatch.setattr(precision_recall.tiles, "__defaults__", (tile,))
    precision, recall = precision_recall.precision_recall(one, two)
    assert 0 < precision < 1
    assert precision == pytest.approx(expected["precision"], abs=1e-7)
    assert recall == pytest.approx(expected["recall"], abs=1e-7)
    with pytest.raises(ValueError, match="expected more than 3 images"):
        precision_recall.precision_recall(one[:3], two)


def test_the_quick_distance_is_the_exact_one() -> None:
    one, two = features(50, 32, seed=1).astype(np.float64), features(20, 32, seed=2).astype(np.float64)
    reference = FrechetReference(two.mean(0), np.cov(two, rowvar=False))
    blocks = [reference.project(FeatureSums.of(part)) for part in np.split(one, 5)]
    exact = reference.distance(one.mean(0), np.cov(one, rowvar=False))
    assert reference.approximate_distance(sum(blocks[1:], blocks[0])) == pytest.approx(exact, rel=1e-6)
    left = np.concatenate([one[:10], one[20:]])
    without = sum(blocks[1:], blocks[0]) - blocks[1]
    assert reference.approximate_distance(without) == pytest.approx(reference.distance(left.mean(0), np.cov(left, rowvar=False)), rel=1e-6)


def test_blocks_hold_equal_numbers_of_every_class() -> None:
    labels = np.repeat(np.arange(5), 30)
    found = uncertainty.blocks(labels)
    assert (np.stack([np.bincount(found[labels == label], minlength=10) for label in range(5)]) == 3).all()
    assert (found != uncertainty.blocks(np.zeros(150, int))).any()


def test_jackknife_error_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(5, 2, 40)
    without = (values.sum() - values) / 39
    assert uncertainty.jackknife_error(without) == pytest.approx(values.std(ddof=1) / np.sqrt(40), rel=1e-12)
    assert uncertainty.batch_error(values) == pytest.approx(values.std(ddof=1) / np.sqrt(40), rel=1e-12)


def test_extrapolation_takes_the_bias_of_few_samples_away() -> None:
    counts = np.array([100, 200, 400, 800])
    assert uncertainty.extrapolated(counts, 3.0 + 70.0 / counts) == pytest.approx(3.0, rel=1e-9)


def test_records_of_metrics_are_checked_by_the_parity_benchmark(tmp_path: Path) -> None:
    one, two = features(90, 24, seed=1) / 9, features(70, 24, seed=2) / 9
    logits = np.random.default_rng(0).normal(0, 3, (90, 20)).astype(np.float32)
    prc = prc_features_to_metric(torch.from_numpy(one).double(), torch.from_numpy(two).double(), save_cpu_ram=True, verbose=False)
    expected = {
        **isc_features_to_metric(torch.from_numpy(logits), splits=10),
        "precision": prc["precision"],
        "frechet_distance": frechet_distance(*FeatureSums.of(one).moments(), *FeatureSums.of(two).moments()),
    }
    arrays = {"generated.features": one, "generated.logits": logits, "reference.features": two}
    metadata = {"kind": "metrics", "kid_subsets": "5", "kid_subset_size": "40", "inception_score_splits": "10", "seed": "2020"}
    for name, values in {"right": expected, "wrong": {**expected, "frechet_distance": expected["frechet_distance"] + 0.01}}.items():
        save_file(arrays, tmp_path / name, {**metadata, "neighbours": "3", "expected": json.dumps(values)})
    save_file(arrays, tmp_path / "bare", metadata)
    command = [sys.executable, "-m", "benchmarks.parity", "--json", *(str(tmp_path / name) for name in ("right", "wrong", "bare"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["quantity"] for row in rows if not row["passed"]] == ["frechet_distance"]
    assert len(rows) == 8
    assert "bare is no record of metrics: it has no neighbours in the metadata" in done.stderr
    assert done.returncode == 2
