import numpy as np
import pytest
import scipy.linalg

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
    statistics = sums_of(values, blocks).statistics("net", "digest")
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
        FeatureSums.of(features(1, 3)).statistics("net", "digest")


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
    statistics = FeatureSums.of(features(30, 6)).statistics("efficientnet-lite0", "abc")
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
