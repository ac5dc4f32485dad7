"""The result of training a tokenizer: weights, PSNR and a picture of reconstructions."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mar_model.tokenizers import KLAutoencoder, save_tokenizer
from pipelines.images.listing import ImageListing
from pipelines.images.pairs import pairs_picture, psnr
from pipelines.images.pixels import to_model, to_uint8
from pipelines.images.reading import DecodedImages
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import autocast
from pipelines.runtime.errors import UserError
from pipelines.tokenizing.job import TokenizerJob
from pipelines.tokenizing.settings import TokenizerSettings

RESULT = "training.json"  # written when the trained tokenizer is in place

EVALUATED = 500  # images that PSNR is measured on, spread evenly over the held-out part

PAIRS = 8


@torch.no_grad()
def write_result(job: TokenizerJob, tokenizer: KLAutoencoder, listing: ImageListing, figures: dict[str, Any]) -> None:
    """Measure PSNR, and write the tokenizer, the picture of pairs, and `training.json` last of all. Images that can't be used are not
    counted. Raises UserError for a tokenizer that does not reconstruct finite numbers: the last step may have made it so."""
    path = job.tokenizer.path
    part = "held_out" if listing.held_out() else "train"
    rows = listing.held_out() or listing.train()
    rows = rows[:: max(1, len(rows) // EVALUATED)][:EVALUATED]
    images = DecodedImages(replace(job.images, max_rejected=1.0), rows)
    device = next(tokenizer.parameters()).device
    decibels: list[np.ndarray] = []
    pairs: list[np.ndarray] = []
    shown = {index * len(rows) // PAIRS for index in range(PAIRS)}
    for start in range(0, len(rows), job.tokenizer.batch):
        indices = np.arange(start, min(start + job.tokenizer.batch, len(rows)))
        originals, _ = images.take(indices)
        with autocast(job.tokenizer.precision, device):
            moments = tokenizer.encode(to_model(originals).to(device))
            decoded = tokenizer.decode(moments[:, : tokenizer.channels])
        if not bool(decoded.isfinite().all()):
            raise diverged(f"its reconstructions are not finite after {job.tokenizer.images} images", job.tokenizer)
        reconstructions = to_uint8(decoded)
        used = [index not in images.rejected for index in indices.tolist()]  # in a rejected one's place stands the next
        decibels.append(psnr(originals, reconstructions)[used])
        pairs += [np.stack([originals[i - start], reconstructions[i - start]]) for i in indices if i in shown]
    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(tokenizer, Path(temporary))
        for name in ("tokenizer.safetensors", "config.json"):
            storage.write_bytes(storage.join(path, name), (Path(temporary) / name).read_bytes())
    storage.write_bytes(storage.join(path, "pairs.png"), pairs_picture(np.stack(pairs)))
    measured = np.concatenate(decibels)
    quality = {f"psnr_{part}": round(float(measured.mean()), 4), "psnr_images": len(measured)}
    storage.write_json(storage.join(path, RESULT), {**quality, **figures})


def diverged(found: str, settings: TokenizerSettings) -> UserError:
    return UserError(
        f"training the tokenizer diverged ({found})",
        remedy=f"lower tokenizer.learning_rate, now {settings.learning_rate:g}, and give another tokenizer.path",
    )
