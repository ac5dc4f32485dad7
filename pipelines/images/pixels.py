"""An opened image as 8-bit RGB: as Pillow converts, except greyscale of more than 8 bits, which Pillow clips at 255."""

import numpy as np
from PIL import Image, ImageOps

from pipelines.runtime.errors import ImageError

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # values of PHOTOMETRIC and SAMPLE_FORMAT


def to_rgb(image: Image.Image, exif: bool) -> Image.Image:
    """The image in mode RGB, rotated as its EXIF orientation states if `exif`.

    Greyscale of 12, 16 or 32 bits is scaled from its nominal range to 0 … 255 and rounded; colour of 16 bits keeps its high bytes, as
    Pillow reads it. Alpha is dropped. Raises ImageError for pixels without a nominal range: floating-point and signed ones.
    """
    black_white = _nominal_range(image)
    shown = ImageOps.exif_transpose(image) if exif else image
    return (_in_8_bits(shown, *black_white) if black_white else shown).convert("RGB")


def _nominal_range(image: Image.Image) -> tuple[int, int] | None:
    """The values of black and of white where a pixel is one number of more than 8 bits; None for all other images."""
    if image.mode == "F":
        raise ImageError("its pixels are floating-point numbers, of which none is known to be white; convert it to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return None
    if image.format == "TIFF":
        tags = image.getexif()
        if tags.get(SAMPLE_FORMAT) == SIGNED:
            raise ImageError("its pixels are signed integers, of which none is known to be black; convert it to unsigned 8 or 16 bits")
        white = 2 ** tags[BITS_PER_SAMPLE] - 1
        return (white, 0) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (0, white)
    if image.mode == "I" and image.format != "PPM":  # PGM of any maximum: Pillow scales it to 65,535
        raise ImageError(
            f"its pixels are 32-bit integers (format {image.format}), of which none is known to be white; convert it to 8 bits"
        )
    return 0, 2**16 - 1


def _in_8_bits(image: Image.Image, black: int, white: int) -> Image.Image:
    values = np.asarray(image)
    if max(black, white) == 2**32 - 1:  # Pillow holds them as signed numbers; the high 16 bits decide
        values, black, white = values.view(np.uint32) >> 16, black >> 16, white >> 16
    table = np.rint((np.arange(max(black, white) + 1) - black) * (255 / (white - black))).astype(np.uint8)
    return Image.fromarray(table[values])
