"""A tokenizer and a checkpoint of random weights, small enough for tests, and a source of images in three classes."""

from pathlib import Path

import numpy as np
import torch
from checkpoint_files import save_checkpoint
from PIL import Image

from mar_model.config import MARConfig
from mar_model.mar import MAR
from mar_model.noise import stream
from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer
from pipelines.tokenizing.directory import tokenizer_digest

CLASSES, SIZE = ["ant", "bee", "cat"], 32


def write_tokenizer(directory: Path) -> str:
    """A KL autoencoder of stride 8: 32×32 images, 4×4×4 latents. Returns its path."""
    torch.manual_seed(0)
    save_tokenizer(
        KLAutoencoder(KLConfig(channels=4, width=32, multipliers=(1, 1, 1, 1), encoder_blocks=1, decoder_blocks=1, attention=False)),
        directory,
    )
    return str(directory)


def write_checkpoint(directory: Path, tokenizer: str) -> str:
    """A random MAR whose denoiser's output layer is random too (at its initial zeros guidance would change nothing)."""
    torch.manual_seed(1)
    config = MARConfig(
        encoder_depth=1, encoder_width=32, encoder_heads=2, decoder_depth=1, decoder_width=32, decoder_heads=2, buffer_size=4,
        denoiser_depth=1, denoiser_width=32, latent_size=4, latent_channels=4, classes=len(CLASSES),
    )  # fmt: skip
    model = MAR(config)
    with torch.no_grad():
        for parameter in model.diffloss.net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=stream(2, "tests"))
    state = {
        "images_seen": 640,
        "step": 1,
        "intervals": [],
        "interval": [],
        "class_names": CLASSES,
        "image_size": SIZE,
        "latent_mean": [0.1, 0.0, -0.1, 0.2],
        "latent_std": [1.0, 1.1, 0.9, 1.0],
        "latent_min": [-3.0] * 4,
        "latent_max": [3.0] * 4,
        "tokenizer": {"path": tokenizer, "digest": tokenizer_digest(tokenizer)},
    }
    save_checkpoint(directory, model, model.state_dict(), state)
    return str(directory)


def write_images(directory: Path, per_class: int = 8) -> str:
    """An ImageFolder of parts `train` and `held_out`, `per_class` images a class each: a bright bar whose place says the class."""
    for part in ("train", "held_out"):
        for label, name in enumerate(CLASSES):
            (directory / part / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = np.random.default_rng([label, number, len(part)]).integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
                pixels[8 + 6 * label : 12 + 6 * label] = 230
                Image.fromarray(pixels).save(directory / part / name / f"{number:03d}.png")
    return str(directory)
