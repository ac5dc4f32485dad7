"""A small classifier trained on an image source: the judge of whether a drawn image shows the class it was asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mar_model.checkpoints.checkpoint import load_weights
from mar_model.files import read_tensors
from pipelines.images.pixels import to_model
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError, UserError

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "classifier.safetensors"
WIDTHS = (24, 48, 64)
MAP_SIDE = 4


REMEDY = "bring it back from a copy; or delete its directory and run `mar quickstart` again; or leave evaluate.classifier empty"


@dataclass(frozen=True)
class Config:
    """What `config.json` holds."""

    format_version: int
    image_size: int
    class_names: list[str]


class Classifier(nn.Module):
    """Four convolutions that end in a 4×4 map, and a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.features = nn.Sequential(
            *_convolution(3, first, kernel=5, stride=2),
            *_convolution(first, second),
            nn.MaxPool2d(2),
            *_convolution(second, third),
            *_convolution(third, third),
            nn.AdaptiveMaxPool2d(MAP_SIDE),
        )
        self.dropout = nn.Dropout(0.2)
        self.output = nn.Linear(third * MAP_SIDE**2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] → logits (N, classes)."""
        return self.output(self.dropout(self.features(images).flatten(1)))

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) → labels (N,) int64; in evaluation mode."""
        device = self.output.weight.device
        return np.concatenate([self(to_model(part).to(device)).argmax(dim=1).cpu().numpy() for part in _parts(images)])


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def _parts(images: np.ndarray, size: int = 256) -> Iterator[np.ndarray]:
    yield from (images[start : start + size] for start in range(0, len(images), size))


def read_config(path: str) -> dict[str, Any]:
    """`config.json` of the classifier in directory `path`. Raises UserError where there is none, or one of another format."""
    if not storage.exists(storage.join(path, CONFIG)):
        raise UserError(f"evaluate.classifier {path!r} holds no classifier ({CONFIG} is missing)", remedy="leave it empty to go without")
    config: dict[str, Any] = storage.read_json(storage.join(path, CONFIG), Config, REMEDY)
    if config["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}/{CONFIG} has format_version {config['format_version']!r}, expected {FORMAT_VERSION}")
    return config


def check_classes(path: str, classes: int) -> None:
    """Raise UserError unless the classifier in directory `path` can be loaded and tells as many classes apart as the checkpoint draws."""
    found = load_classifier(path).output.out_features
    if found != classes:
        raise UserError(
            f"evaluate.classifier {path!r} knows {found} classes, the checkpoint {classes}", remedy="name one trained on the same source"
        )


def classifier_digest(path: str) -> str:
    """SHA-256 of the classifier's weights. Raises UserError where there is none."""
    read_config(path)
    return storage.digest(storage.read_bytes(storage.join(path, WEIGHTS)))


def load_classifier(path: str) -> Classifier:
    """The classifier in directory `path`, on the CPU, in evaluation mode. Raises UserError where there is none, and DamagedFileError."""
    config = read_config(path)
    classifier = Classifier(len(config["class_names"]))
    file = storage.local_directory(path) / WEIGHTS
    try:
        load_weights(classifier, read_tensors(file))
    except (FileNotFoundError, ValueError) as error:
        text = str(error) if str(file) in str(error) else f"{file}: {error}"
        raise DamagedFileError(text, REMEDY) from error
    return classifier.eval()
