"""Evaluation of a tokenizer: metrics of pairs against direct computations, and the whole path on a real Ray."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
import scipy.ndimage
import torch
from listening import Listening
from tiny_run import write_images, write_tokenizer

from mar_model.tokenizers import load_tokenizer
from mar_model.tokenizers.losses.perceptual import LPIPS
from pipelines.evaluation.features.efficientnet import EfficientNetLite0
from pipelines.evaluation.metrics import uncertainty
from pipelines.evaluation.metrics.frechet import FeatureSums, frechet_distance
from pipelines.evaluation.metrics.paired import distance_without, distances_without
from pipelines.evaluation.reconstructions import pixel_metrics as pixels
from pipelines.evaluation.reconstructions.measure import reconstruction_name
from pipelines.evaluation.reconstructions.stage import evaluate_tokenizer
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.images.pixels import to_model, to_uint8
from pipelines.images.reading import decode_row
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError

RFID = "reconstruction_frechet_distance_efficientnet-lite0"
PAIRS = [np.random.default_rng(seed).integers(0, 256, (3, 24, 20, 3), dtype=np.uint8) for seed in (0, 1)]


def direct_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """By scipy's Gaussian filter, of a window cut off at 5 pixels, for one pair (H, W, 3)."""
    found = []
    for channel in range(3):
        x, y = (image[..., channel].astype(np.float64) for image in (one, other))
        mean, square, product = (scipy.ndimage.gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5] for values in (x, x * x, x * y))
        mean_y, square_y = (scipy.ndimage.gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5] for values in (y, y * y))
        c1, c2 = 2.55**2, 7.65**2
        top = (2 * mean * mean_y + c1) * (2 * (product - mean * mean_y) + c2)
        found.append((top / ((mean**2 + mean_y**2 + c1) * (square - mean**2 + square_y - mean_y**2 + c2))).mean())
    return float(np.mean(found))


def test_ssim_is_that_of_a_direct_computation() -> None:
    noisy = (PAIRS[0].astype(int) + PAIRS[1] // 8).clip(0, 255).astype(np.uint8)
    for other in (noisy, PAIRS[1]):
        expected = [direct_ssim(*pair) for pair in zip(PAIRS[0], other, strict=True)]
        np.testing.assert_allclose(pixels.ssim(PAIRS[0], other), expected, rtol=1e-10)
    np.testing.assert_allclose(pixels.ssim(PAIRS[0], PAIRS[0]), 1)
    assert np.isnan(pixels.ssim(PAIRS[0][:, :10], PAIRS[1][:, :10])).all()


def test_lpips_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()  # its own linear layers, VGG16 of random weights
    # its slices keep torchvision's numbers
    features = {f"features.{name.split('.', 1)[1]}": value for name, value in package.net.state_dict().items()}
    path = tmp_path / "vgg16.pth"
    torch.save({**features, "classifier.0.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"evaluate\.lpips_weights '.*vgg16\.pth' has the SHA-256 [0-9a-f]{16}…, expected 397923af…"):
        pixels.lpips_network(str(path))
    network = pixels.lpips_network(f"{path}#sha256={storage.digest(path.read_bytes())}")
    images = [np.random.default_rng(seed).integers(0, 256, (3, 64, 48, 3), dtype=np.uint8) for seed in (0, 1)]
    with torch.inference_mode():
        expected = package(*(to_model(one) for one in images)).flatten()
    found = pixels.pixel_metrics(*images, network)["lpips"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def features_of_pairs(count: int, dimension: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    originals = generator.normal(size=(count, dimension)) * np.linspace(0.5, 2, dimension)
    return originals, 0.9 * originals + 0.1 + generator.normal(0, 0.2, (count, dimension))


def blocks_of(count: int) -> list[tuple[int, int]]:
    return [(number * count // 10, (number + 1) * count // 10) for number in range(10)]


@pytest.mark.parametrize("count", [23, 90])
def test_distances_without_some_pairs_are_those_of_the_others(count: int) -> None:
    one, other = features_of_pairs(count, 30, 0)
    found = distances_without(one, other, blocks_of(count))
    sums = [tuple(FeatureSums.of(values[start:stop]) for values in (one, other)) for start, stop in blocks_of(count)]
    for number, (start, stop) in enumerate(blocks_of(count)):
        rest = [np.delete(values, np.s_[start:stop], axis=0) for values in (one, other)]
        expected = frechet_distance(*(part for values in rest for part in (values.mean(0), np.cov(values, rowvar=False))))
        assert found[number] == pytest.approx(expected, rel=1e-6)
        assert distance_without(number, *sums) == pytest.approx(expected, rel=1e-6)


def test_the_error_of_a_distance_of_pairs_is_how_much_it_varies_with_the_images() -> None:
    distances, errors = [], []
    for seed in range(60):
        one, other = features_of_pairs(200, 6, seed)
        distances.append(frechet_distance(*(part for values in (one, other) for part in FeatureSums.of(values).moments())))
        errors.append(uncertainty.jackknife_error(distances_without(one, other, blocks_of(200))))
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.25)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, ray_local: ClusterSettings) -> dict[str, Any]:
    """A tokenizer of random weights, evaluated on the 24 held-out images."""
    root = tmp_path_factory.mktemp("reconstructions")
    tokenizer = write_tokenizer(root / "tokenizer")
    images = Images(ImageSettings(source=write_images(root / "images"), size=32, held_out_folder="held_out"))
    settings = EvaluateSettings(path=str(root / "one"), tokenizer=tokenizer, features="efficientnet-lite0", batch=8)
    stage = Listening(ray_local)
    return {"root": root, "images": images, "settings": settings, "stage": stage, "summary": evaluate_tokenizer(images, settings, stage)}


def test_the_metrics_are_those_of_reconstructions_made_here(evaluated: dict[str, Any]) -> None:
    rows = evaluated["images"].listing.held_out()
    originals = np.stack([decode_row(evaluated["images"].settings, row).pixels for row in rows])
    tokenizer = load_tokenizer(Path(evaluated["settings"].tokenizer))
    with torch.inference_mode():
        reconstructions = to_uint8(tokenizer.decode(tokenizer.encode(to_model(originals))[:, :4]))
    network = EfficientNetLite0(torch.device("cpu"))
    moments = [part for images in (originals, reconstructions) for part in FeatureSums.of(network(images)).moments()]
    found, record = evaluated["summary"], storage.read_json(f"{evaluated['settings'].path}/evaluation.json")
    assert found[RFID] == pytest.approx(frechet_distance(*moments), rel=1e-4)
    error = ((originals.astype(float) - reconstructions) ** 2).mean(axis=(1, 2, 3))
    decibels = 10 * np.log10(255**2 / error)
    assert found["psnr"] == pytest.approx(decibels.mean(), abs=1e-3)
    assert record["standard_errors"]["psnr"] == pytest.approx(decibels.std(ddof=1) / 24**0.5, rel=1e-3)
    expected = np.mean([direct_ssim(*pair) for pair in zip(originals, reconstructions, strict=True)])
    assert found["ssim"] == pytest.approx(expected, rel=1e-3)
    order = uncertainty.fair_order(np.arange(24) // 8)  # in blocks of all classes
    pairs = [network(images[order]) for images in (originals, reconstructions)]
    without = [np.delete(np.arange(24), np.arange(number * 24 // 10, (number + 1) * 24 // 10)) for number in range(10)]
    distances = [frechet_distance(*(part for one in pairs for part in FeatureSums.of(one[rows]).moments())) for rows in without]
    assert record["standard_errors"][RFID] == pytest.approx(uncertainty.jackknife_error(np.array(distances)), rel=1e-2)
    assert "together with their reconstructions" in record["standard_error_method"]
    assert record["left_out"] == {"lpips": pixels.NO_WEIGHTS}
    assert (record["reference"]["split"], record["images"], record["tokenizer"]["kind"]) == ("held_out", 24, "kl")
    assert record["metrics"].keys() == {RFID, "psnr", "ssim"} == record["definitions"].keys()
    assert "warning: 24 samples" in found["caution"]
    assert Path(evaluated["settings"].path, "pairs.png").is_file()


def test_two_actors_and_a_resume_give_the_same_numbers_and_another_tokenizer_is_refused(evaluated: dict[str, Any]) -> None:
    folder = evaluated["root"] / "two"
    settings = replace(evaluated["settings"], path=str(folder), actors=2)
    found = evaluate_tokenizer(evaluated["images"], settings, evaluated["stage"])
    (folder / "summary.json").unlink()
    shards = sorted(folder.glob("pairs/*.arrow"))
    assert len(shards) == 3
    shards[1].unlink()
    kept = shards[0].stat().st_mtime_ns
    resumed = evaluate_tokenizer(evaluated["images"], settings, evaluated["stage"])
    assert shards[0].stat().st_mtime_ns == kept
    for name in (RFID, "psnr", "ssim"):
        assert found[name] == pytest.approx(evaluated["summary"][name], rel=1e-9)
        assert resumed[name] == pytest.approx(found[name], rel=1e-9)
    config = Path(evaluated["settings"].tokenizer) / "config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(before)))
        with pytest.raises(UserError, match="tokenizer"):
            evaluate_tokenizer(evaluated["images"], settings, evaluated["stage"])
    finally:
        config.write_text(before)


def test_lpips_is_computed_again_with_other_weights(evaluated: dict[str, Any], tmp_path: Path) -> None:
    found, settings = [], replace(evaluated["settings"], path=str(tmp_path / "out"))
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        path = tmp_path / f"vgg16-{seed}.pth"
        torch.save({name: value for name, value in LPIPS().state_dict().items() if name.startswith("features.")}, path)
        given = f"{path}#sha256={storage.digest(path.read_bytes())}"
        found.append(evaluate_tokenizer(evaluated["images"], replace(settings, lpips_weights=given), evaluated["stage"]))
    assert found[0]["psnr"] == found[1]["psnr"]
    assert found[0]["lpips"] != pytest.approx(found[1]["lpips"], rel=1e-3)
    assert found[2] == found[1]  # complete
    assert found[1]["lpips_weights"] == storage.digest((tmp_path / "vgg16-1.pth").read_bytes())


def test_what_cannot_be_evaluated_is_refused_in_one_line(evaluated: dict[str, Any], tmp_path: Path) -> None:
    settings = replace(evaluated["settings"], path=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"holds no tokenizer"):
        evaluate_tokenizer(evaluated["images"], replace(settings, tokenizer=str(tmp_path)), evaluated["stage"])
    odd = Images(replace(evaluated["images"].settings, size=20))
    with pytest.raises(UserError, match=r"images\.size is 20, expected a multiple of 8"):
        evaluate_tokenizer(odd, settings, evaluated["stage"])
    assert not (tmp_path / "out").exists()


def test_the_distance_of_reconstructions_has_a_name_of_its_own() -> None:
    assert reconstruction_name("inception") == "rfid"
    assert reconstruction_name("efficientnet-lite0") == RFID
    assert reconstruction_name("dinov2") == "reconstruction_fd_dinov2"
