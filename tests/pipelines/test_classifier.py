from pathlib import Path

import numpy as np
import pytest
import torch

from mar_model.noise import stream
from pipelines import storage
from pipelines.classifier import Classifier, classifier_digest, fit, load_classifier, shifted, train_classifier
from pipelines.digits import write_digits
from pipelines.errors import UserError
from pipelines.images import ImageSettings, decode, list_images, read_image
from pipelines.stage import Stage


def test_classifier_of_the_demos_digits(stage: Stage, tmp_path: Path) -> None:
    source, path = str(tmp_path / "digits"), str(tmp_path / "classifier")
    write_digits(source)
    images = ImageSettings(source=source, size=32, held_out_folder="held_out")
    summary = train_classifier(images, path, 0, stage)
    assert (summary["images"], summary["images_held_out"]) == (4500, 500)
    assert summary["accuracy_held_out"] >= 0.97  # the demo's bar

    held_out = list_images(images).held_out()
    pixels = np.stack([decode(read_image(images, row), 32) for row in held_out])
    right = load_classifier(path).predict(pixels) == np.array([row.label for row in held_out])
    assert right.mean() == summary["accuracy_held_out"]
    assert classifier_digest(path, 10) == storage.digest(Path(path, "classifier.safetensors").read_bytes())
    with pytest.raises(UserError, match="knows 10 classes, the checkpoint 3"):
        classifier_digest(path, 3)
    assert train_classifier(images, path, 0, stage) == summary


def test_the_same_seed_gives_the_same_classifier() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    labels = torch.arange(40) % 2
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        classifier = Classifier(2)
        fit(classifier, images, labels, seed)
        weights.append(classifier.output.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_shifts_move_each_image_by_up_to_a_fourteenth() -> None:
    images = torch.zeros(64, 1, 28, 28)
    images[:, :, 10, 20] = 1.0
    moved = shifted(images, stream(0, "test"))
    places = moved.flatten(1).argmax(dim=1)
    assert moved.sum() == 64
    assert (set((places // 28 - 10).tolist()), set((places % 28 - 20).tolist())) == ({-2, -1, 0, 1, 2}, {-2, -1, 0, 1, 2})


def test_no_classifier_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.classifier .* holds no classifier"):
        load_classifier(str(tmp_path))
