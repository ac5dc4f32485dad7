"""A small classifier trained on an image source: the judge of whether a drawn image shows the class it was asked for."""

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mar_model.checkpoints.checkpoint import load_weights
from mar_model.files import read_tensors
from mar_model.noise import stream
from pipelines.images.listing import ImageListing, Images
from pipelines.images.pixels import to_model
from pipelines.images.reading import DecodedImages
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import check_source, remember_source
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import default_device, require_workers, use_threads, worker_resources
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "classifier.safetensors"
WIDTHS = (24, 48, 64)
MAP_SIDE = 4
EPOCHS = 10
BATCH = 64
PEAK_LEARNING_RATE = 8e-3
WEIGHT_DECAY = 0.01
LARGEST_SHIFT = 1 / 14  # of the side: two pixels of a digit of 28


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


def train_classifier(images: Images, path: str, stage: Stage) -> dict[str, Any]:
    """Train on the train part of `images` in one Ray task; `path` gets `classifier.safetensors` and `config.json`.

    The task holds the decoded images in memory. Returns the summary, with `accuracy_held_out` (share of the held-out images that
    are classified right) when the source holds some out. Raises UserError as `list_images` does.
    """
    import ray

    listing = images.listing
    for remark in listing.remarks:
        stage.say(remark)
    identity = {**identity_of(images=images.settings, seed=stage.seed), "images.listing": listing.digest}
    check_source(path, "path of the classifier", images.settings.source, listing, identity, stage)
    finished = stage.begin(path, identity)
    if finished is not None:
        return finished
    require_workers({"classifier": 1}, stage.cluster)
    remember_source(path, listing)
    stage.say(f"training a classifier on {len(listing.train()):,} images")
    task = ray.remote(**worker_resources(stage.cluster))(_train)
    summary = ray.get(task.remote(images.settings, listing, path, stage.seed, stage.cluster))
    return stage.complete(path, identity, summary)


def _train(images: ImageSettings, listing: ImageListing, path: str, seed: int, cluster: ClusterSettings) -> dict[str, Any]:
    use_threads(cluster)
    device = default_device()
    train, held_out = listing.train(), listing.held_out()
    trained = DecodedImages(images, train)
    pixels, labels = trained.take(np.arange(len(train)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "classifier").initial_seed())  # initial weights and dropout know no generator argument
        classifier = Classifier(len(listing.class_names)).to(device).to(memory_format=torch.channels_last)
        fit(classifier, pixels, torch.from_numpy(labels), seed)
    classifier.eval()
    summary: dict[str, Any] = {"images": len(train) - len(trained.rejected), "images_held_out": 0}
    if held_out:
        judged = DecodedImages(images, held_out)
        pixels, labels = judged.take(np.arange(len(held_out)))
        right = np.delete(classifier.predict(pixels) == labels, list(judged.rejected))  # in a rejected one's place stands the next
        summary |= {"images_held_out": len(right), "accuracy_held_out": float(right.mean())}
    with tempfile.TemporaryDirectory() as temporary:
        config = {"format_version": FORMAT_VERSION, "image_size": images.size, "class_names": listing.class_names}
        (Path(temporary) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file({name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}, Path(temporary) / WEIGHTS)
        for name in (WEIGHTS, CONFIG):
            storage.write_bytes(storage.join(path, name), (Path(temporary) / name).read_bytes())
    return summary


def fit(classifier: Classifier, images: np.ndarray, labels: Tensor, seed: int) -> None:
    """AdamW with a one-cycle learning rate on cross entropy; each image is shifted at random every time it is seen.

    images: uint8 (N, H, W, 3), labels: (N,). Changes `classifier` in place.
    """
    device = classifier.output.weight.device
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    classifier.train()
    for epoch in range(EPOCHS):
        generator = stream(seed, "classifier", epoch)
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            batch = shifted(to_model(images[rows.numpy()]), generator).to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(classifier(batch), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) moved by its own random number of pixels, up to LARGEST_SHIFT of the side; its edge is repeated."""
    reach = round(images.shape[-1] * LARGEST_SHIFT)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * reach + 1, (len(images), 2), generator=generator)
    height, width = images.shape[-2:]
    crops = [one[:, y : y + height, x : x + width] for one, (y, x) in zip(padded, offsets.tolist(), strict=True)]
    return torch.stack(crops)


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
