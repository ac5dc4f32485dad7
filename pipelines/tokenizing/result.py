"""The result of training a tokenizer: weights, PSNR and a picture of reconstructions."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mar_model.tokenizers import KLAutoencoder, VQAutoencoder, save_tokenizer
from pipelines.images.listing import ImageListing
from pipelines.images.pairs import pairs_picture, psnr
from pipelines.images.pixels import to_model, to_uint8
from pipelines.images.reading import DecodedImages
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import autocast
from pipelines.runtime.errors import UserError
from pipelines.tokenizing.directory import keep_latents
from pipelines.tokenizing.job import TokenizerJob
from pipelines.tokenizing.settings import TokenizerSettings

RESULT = "training.json"  # written when the trained tokenizer is in place

EVALUATED = 500  # images that PSNR is measured on, spread evenly over the held-out part

AT_ONCE = 64  # images

PAIRS = 8


@dataclass(frozen=True)
class Result:
    """What `training.json` holds."""

    psnr_images: int
    loss: float
    loss_curve: list[tuple[float, float]]
    psnr_held_out: float | None = None  # or
    psnr_train: float | None = None


class Pair(NamedTuple):
    """An image and its reconstruction, uint8 (H, W, 3). `used` is False where the image could not be used and the next one stands there."""

    original: np.ndarray
    reconstruction: np.ndarray
    used: bool


class HeldOut:
    """The images that PSNR is measured on: up to 500 of the held-out part, or where nothing is held out of the train part."""

    def __init__(self, job: TokenizerJob, listing: ImageListing) -> None:
        rows = listing.held_out() or listing.train()
        self.part = "held_out" if listing.held_out() else "train"
        self.rows = rows[:: max(1, len(rows) // EVALUATED)][:EVALUATED]
        self.settings = job.tokenizer
        self._images = DecodedImages(replace(job.images, max_rejected=1.0), self.rows)

    @torch.no_grad()
    def pairs(self, tokenizer: KLAutoencoder | VQAutoencoder) -> Iterator[Pair]:
        """All images and their reconstructions. Raises UserError where these are not finite: the last step may have made them so."""
        parameter = next(tokenizer.parameters())
        for start in range(0, len(self.rows), AT_ONCE):
            indices = np.arange(start, min(start + AT_ONCE, len(self.rows)))
            originals, _ = self._images.take(indices)
            with autocast(self.settings.precision, parameter.device):
                latents = tokenizer.moments(to_model(originals).to(parameter.device))[:, : tokenizer.channels]
                decoded = tokenizer.decode(latents)
            if not bool(decoded.isfinite().all()):
                raise diverged(f"its reconstructions are not finite after {self.settings.images} images", self.settings)
            for index, original, reconstruction in zip(indices.tolist(), originals, to_uint8(decoded), strict=True):
                yield Pair(original, reconstruction, index not in self._images.rejected)

    def psnr(self, tokenizer: KLAutoencoder | VQAutoencoder) -> float:
        """The mean over the images in dB. Raises UserError as `pairs` does."""
        return float(np.mean([psnr(one.original[None], one.reconstruction[None])[0] for one in self.pairs(tokenizer) if one.used]))


def write_result(job: TokenizerJob, tokenizer: KLAutoencoder | VQAutoencoder, held_out: HeldOut, figures: dict[str, Any]) -> None:
    """Measure PSNR, and write the tokenizer, the picture of pairs, and `training.json` last of all. Images that can't be used are not
    counted. Raises UserError for a tokenizer that does not reconstruct finite numbers."""
    path = job.tokenizer.path
    pairs = list(held_out.pairs(tokenizer))
    shown = [pairs[index * len(pairs) // PAIRS] for index in range(PAIRS)] if len(pairs) > PAIRS else pairs
    used = [one for one in pairs if one.used]
    decibels = psnr(np.stack([one.original for one in used]), np.stack([one.reconstruction for one in used]))
    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(tokenizer, Path(temporary))
        for name in ("tokenizer.safetensors", "config.json"):
            storage.write_bytes(storage.join(path, name), (Path(temporary) / name).read_bytes())
    if job.tokenizer.train == "decoder":
        keep_latents(path, job.tokenizer.init_from)
    storage.write_bytes(storage.join(path, "pairs.png"), pairs_picture(np.stack([np.stack(one[:2]) for one in shown])))
    quality = {f"psnr_{held_out.part}": round(float(decibels.mean()), 4), "psnr_images": len(decibels)}
    storage.write_json(storage.join(path, RESULT), {**quality, **figures})


def diverged(found: str, settings: TokenizerSettings) -> UserError:
    return UserError(
        f"training the tokenizer diverged ({found})",
        remedy=f"lower tokenizer.learning_rate, now {settings.learning_rate:g}, and give another tokenizer.path",
    )
