"""Encoded images to pixels: decoding to 8-bit RGB (as Pillow converts, except greyscale of more than 8 bits, which Pillow clips at 255),
centre crop, and conversion to and from tensors."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from pipelines.runtime.errors import ImageError

LARGEST_SCALED = 2**27  # pixels of the scaled image before the crop: 384 MiB

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # values of PHOTOMETRIC and SAMPLE_FORMAT


def to_rgb(image: Image.Image, exif: bool) -> Image.Image:
    """Convert to mode RGB, rotated according to the EXIF orientation if `exif`.

    Greyscale of 12, 16 or 32 bits is scaled from its nominal range to 0 … 255 and rounded; colour of 16 bits keeps its high bytes, as
    Pillow reads it. Alpha is dropped. Raises ImageError for pixels without a nominal range: floating-point and signed ones.
    """
    black_white = _nominal_range(image)
    shown = ImageOps.exif_transpose(image) if exif else image
    return (_in_8_bits(shown, *black_white) if black_white else shown).convert("RGB")


def _nominal_range(image: Image.Image) -> tuple[int, int] | None:
    """The values of black and white for single-channel images of more than 8 bits; None for all other images."""
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined white; convert the image to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return None
    if image.format == "TIFF":
        tags = image.getexif()
        if tags.get(SAMPLE_FORMAT) == SIGNED:
            raise ImageError("signed integer pixels have no defined black; convert the image to unsigned 8 or 16 bits")
        white = 2 ** tags[BITS_PER_SAMPLE] - 1
        return (white, 0) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0, white)
    if image.mode == "I" and image.format != "PPM":  # Pillow scales PGM of any maximum to 65,535
        raise ImageError(f"32-bit integer pixels (format {image.format}) have no defined white; convert the image to 8 bits")
    return 0, 2**16 - 1


def _in_8_bits(image: Image.Image, black: int, white: int) -> Image.Image:
    values = np.asarray(image)
    if max(black, white) == 2**32 - 1:  # Pillow stores them as signed; the high 16 bits are used
        values, black, white = values.view(np.uint32) >> 16, black >> 16, white >> 16
    table = np.rint((np.arange(max(black, white) + 1) - black) * (255 / (white - black))).astype(np.uint8)
    return Image.fromarray(table[values])


def decode(data: bytes, size: int, exif: bool = False) -> np.ndarray:
    """Decode the first frame to RGB (see `to_rgb`), rotated according to its EXIF orientation if `exif`, and crop to uint8
    (size, size, 3). Raises ImageError with the reason if that is impossible."""
    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return centre_crop(to_rgb(image, exif), size)
    except ImageError:
        raise
    except Exception as error:  # on arbitrary bytes Pillow raises OSError, ValueError, SyntaxError, struct.error, …
        text = str(error).split(" <_io.BytesIO")[0]  # without the memory address, so that the reason is reproducible
        raise ImageError(f"{type(error).__name__}: {text}") from error


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The ADM centre crop (Dhariwal & Nichol 2021) of an RGB image: uint8 (size, size, 3).

    Halve with a box filter while the short side is at least twice `size`, scale the short side to `size` (bicubic), crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > LARGEST_SCALED:
        raise ImageError(f"{image.width} × {image.height} pixels: aspect ratio too extreme for a square crop")
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].copy()


def to_model(images: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Float (N, 3, H, W) in [-1, 1] → uint8 (N, H, W, 3), rounded; values out of range are clamped, NaN becomes 0."""
    pixels = ((images.detach().float().nan_to_num(nan=-1.0) + 1.0) * 127.5).round().clamp(0, 255)
    return np.ascontiguousarray(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
