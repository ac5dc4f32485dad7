"""Synthetic photographs and small tokenizers for the cache benchmarks, and their table rows."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer

DISTINCT = 100  # distinct photographs; the others are copies under other names
CLASSES = 10
BATCH = 32
SMALL = KLConfig(channels=4, width=8, multipliers=(1, 1, 2), encoder_blocks=1, decoder_blocks=1, attention=False)
MIDDLE = KLConfig(channels=4, width=4, multipliers=(1, 2, 4, 4), encoder_blocks=1, decoder_blocks=1, attention=False)


def write_photographs(folder: Path, images: int, size: tuple[int, int] = (500, 375)) -> str:
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(min(images, DISTINCT)):
        pixels = np.zeros((size[1], size[0], 3), np.float32)
        for cell in (4, 16, 64):
            coarse = generator.integers(0, 256, (size[1] // cell + 1, size[0] // cell + 1, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32) / 3
        sink = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(sink, "JPEG", quality=90)
        encoded.append(sink.getvalue())
    for number in range(images):
        path = folder / f"{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[number % len(encoded)])
    return str(folder)


def write_tokenizer(folder: Path, config: KLConfig) -> str:
    torch.manual_seed(0)
    save_tokenizer(KLAutoencoder(config), folder)
    return str(folder)


def row(what: str, found: str, baseline: str, ratio: str, bar: str) -> None:
    print(f"{what:<42} {found:>18} {baseline:>20} {ratio:>12} {'bar ' + bar:>16}", flush=True)
