"""Training of the classifier that measures label agreement, in one Ray task."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mar_model.noise import stream
from pipelines.evaluation.classifier.network import CONFIG, FORMAT_VERSION, WEIGHTS, Classifier
from pipelines.images.listing import ImageListing, Images
from pipelines.images.pixels import to_model
from pipelines.images.reading import DecodedImages
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import check_source, remember_source
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import default_device, require_workers, use_threads, worker_resources
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage

EPOCHS = 10
BATCH = 64
PEAK_LEARNING_RATE = 8e-3
WEIGHT_DECAY = 0.01
LARGEST_SHIFT = 1 / 14  # of the side: two pixels of a digit of 28


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
