"""Pairs of an original and its reconstruction: PSNR, and a picture of them."""

import io
import math

import numpy as np
from PIL import Image

PAIR_PIXELS = 96  # smallest side of an image in the picture of pairs


def psnr(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB (peak 255): two uint8 (n, H, W, 3) → float64 (n,); at most 100 dB."""
    error = (originals.astype(np.float64) - reconstructions.astype(np.float64)) ** 2
    decibels: np.ndarray = 10 * np.log10(255.0**2 / np.maximum(error.mean(axis=(1, 2, 3)), 255.0**2 * 1e-10))
    return decibels


def pairs_picture(pairs: np.ndarray) -> bytes:
    """uint8 (n, 2, S, S, 3), original then reconstruction → a PNG of n columns and two rows, small images enlarged."""
    count, _, size, _, _ = pairs.shape
    picture = Image.fromarray(pairs.transpose(1, 2, 0, 3, 4).reshape(2 * size, count * size, 3))
    factor = math.ceil(PAIR_PIXELS / size)
    encoded = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(encoded, format="PNG")
    return encoded.getvalue()
