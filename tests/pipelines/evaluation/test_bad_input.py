"""What an evaluation of given samples refuses: one line that names the thing, and no record."""

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from listening import Listening
from PIL import Image

from pipelines.evaluation.features.weights import DIGEST_GIVEN
from pipelines.evaluation.given_samples import evaluate_given
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import mistake_of

COUNT, SIDE, DIMENSION = 8, 32, 1280
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
MU, SIGMA = np.zeros(DIMENSION), np.eye(DIMENSION)


def refused(root: Path, stage: Listening, **settings: Any) -> str:
    """The error of an evaluation with these settings, after which there is no record."""
    if not (root / "samples.npz").exists():
        np.savez(root / "samples.npz", PIXELS)
    if not (root / "reference.npz").exists():
        np.savez(root / "reference.npz", mu=MU, sigma=SIGMA, network="efficientnet-lite0")
    given = {"samples": str(root / "samples.npz"), "reference": str(root / "reference.npz"), "features": "efficientnet-lite0", "batch": 4}
    evaluate = replace(EvaluateSettings(path=str(root / "out"), metrics=["fid"]), **{**given, **settings})
    with pytest.raises(Exception) as caught:  # noqa: PT011  # as a worker raised it
        evaluate_given(Images(ImageSettings(source=str(root), size=SIDE)), "", evaluate, stage)
    mistake = mistake_of(caught.value)
    assert mistake is not None, caught.value
    written = {one.name for one in (root / "out").rglob("*") if one.is_file()} if (root / "out").exists() else set()
    assert written <= {"identity.json"} | {name for name in written if name.startswith("features-")}, written
    assert "\n" not in str(mistake)
    return str(mistake)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def negative(file: Path) -> None:
    """An `.npz` whose `mu` has a negative side."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}".ljust(117) + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + MU.tobytes())
        archive.writestr("sigma.npy", b"")


REFERENCES: dict[str, tuple[Callable[[Path], None], str]] = {
    "unnamed": (
        lambda file: np.savez(file, mu=MU, sigma=SIGMA),
        r"1280 features of an unnamed network, which stands for inception .*, expected 1280 of efficientnet-lite0",
    ),
    "another": (
        lambda file: np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048), network="inception"),
        r"2048 features of inception .*, expected 1280 of efficientnet-lite0",
    ),
    "other weights": (
        lambda file: np.savez(file, mu=MU, sigma=SIGMA, network="efficientnet-lite0", digest="f" * 64),
        r"\(digest ffffffffffff\), expected 1280 of efficientnet-lite0 \(57934424",
    ),
    "pickled": (lambda file: np.savez(file, mu=np.array([{}], object), sigma=SIGMA), r"reference\.npz is damaged: .*Object arrays"),
    "negative": (negative, r"reference\.npz is damaged"),
    "truncated": (lambda file: (np.savez(file, mu=MU, sigma=SIGMA), cut(file))[0], r"reference\.npz is damaged"),
    "a pickle": (lambda file: file.write_bytes(pickle.dumps({"mu": 0})) and None, r"reference\.npz is damaged: it can't be read as \.npz"),
    "no statistics": (lambda file: np.savez(file, PIXELS), r"it holds neither mu nor sigma, expected mu \(D,\) and sigma \(D, D\)"),
    "images of floats": (
        lambda file: np.savez(file, PIXELS.astype(np.float32), mu=MU, sigma=SIGMA, network="efficientnet-lite0"),
        r"arr_0 in .*reference\.npz is float32",
    ),
    "images of another size": (
        lambda file: np.savez(file, PIXELS[:, :8, :8], mu=MU, sigma=SIGMA, network="efficientnet-lite0"),
        r"holds images of 8 × 8 pixels, the samples have 32 × 32; name a reference of that size",
    ),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_references(kind: str, tmp_path: Path, ray_local: ClusterSettings) -> None:
    write, message = REFERENCES[kind]
    write(tmp_path / "reference.npz")
    error = refused(tmp_path, Listening(ray_local))
    assert re.search(message, error), error


def folder(root: Path, sizes: list[int]) -> str:
    (root / "folder").mkdir()
    for number, side in enumerate(sizes):
        Image.fromarray(PIXELS[number, :side]).save(root / "folder" / f"{number}.png")
    return str(root / "folder")


def test_an_image_of_another_size_in_the_middle_of_a_folder(tmp_path: Path, ray_local: ClusterSettings) -> None:
    error = refused(tmp_path, Listening(ray_local), samples=folder(tmp_path, [SIDE] * 5 + [8, SIDE]))
    assert "holds images of different sizes: 5.png is 32 × 8 pixels, 0.png is 32 × 32 pixels, expected one size" in error
    (tmp_path / "folder" / "5.png").unlink()
    cut(tmp_path / "folder" / "4.png")
    assert "4.png can't be used: " in refused(tmp_path, Listening(ray_local), samples=str(tmp_path / "folder"), path=str(tmp_path / "out2"))


def test_no_samples(tmp_path: Path, ray_local: ClusterSettings) -> None:
    (tmp_path / "folder").mkdir()
    assert "holds no images" in refused(tmp_path, Listening(ray_local), samples=str(tmp_path / "folder"))
    np.savez(tmp_path / "none.npz", PIXELS[:0])
    assert "holds 0 image(s), expected 2 or more" in refused(tmp_path, Listening(ray_local), samples=str(tmp_path / "none.npz"))


def test_features_that_are_not_finite_name_the_sample(tmp_path: Path, ray_local: ClusterSettings) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:  # the only way to build it without downloading
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        weights = FeatureExtractorInceptionV3("broken", ["2048"]).state_dict()
    weights["fc.weight"][7] = torch.nan
    file = tmp_path / "inception.pth"
    torch.save(weights, file)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    settings = {"samples": folder(tmp_path, [SIDE] * 3), "features": "inception"}
    assert "has the SHA-256" in refused(tmp_path, Listening(ray_local), weights=str(file), **settings)
    named = f"{file}{DIGEST_GIVEN}{storage.digest(file.read_bytes())}"
    error = refused(tmp_path, Listening(ray_local), weights=named, **settings)
    assert re.search(r"3 of 3 images have features that are not finite, the first is image \d, \d\.png of .*/folder; check evaluate", error)
