"""Completion: reads the user's image and mask, of which the masked part is drawn, and converts them to the model's format."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mar_model.tokenizers import Tokenizer
from pipelines.images.pixels import decode, to_model
from pipelines.runtime import storage
from pipelines.runtime.errors import ImageError, UserError

HIDING = 127  # the model draws where a mask's pixels are brighter than this


@dataclass(frozen=True)
class Completion:
    """An image cropped to the model's size, and a mask of the pixels to draw."""

    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) bool
    keep_pixels: bool

    @property
    def identity(self) -> dict[str, Any]:
        """Digests of the pixels, independent of the files."""
        return {"image": storage.digest(self.image.tobytes()), "mask": storage.digest(self.mask.tobytes())}

    def fill(self, side: int) -> Tensor:
        """Tokens that the mask touches, as a bool tensor (side, side)."""
        pixels = self.mask.shape[0] // side
        return torch.from_numpy(self.mask.reshape(side, pixels, side, pixels).any(axis=(1, 3)))

    def known(self, tokenizer: Tokenizer, device: torch.device) -> Tensor:
        """The image's latents in the tokenizer's scale, (1, C, h, w): posterior means."""
        return tokenizer.moments(to_model([self.image]).to(device)).chunk(2, dim=1)[0]

    def restored(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (N, H, W, 3), with the given image's pixels where the mask is black, if `keep_pixels`."""
        return np.where(self.mask[:, :, None], images, self.image) if self.keep_pixels else images

    def shown(self) -> np.ndarray:
        """The given image with grey in place of the pixels to draw, (H, W, 3) uint8."""
        return np.where(self.mask[:, :, None], np.uint8(128), self.image)


def read_completion(image: str, mask: str, keep_pixels: bool, size: int) -> Completion:
    """Read both files, rotate each according to its EXIF orientation, and crop both to size × size, as the training images were.

    Raises UserError for a missing file or a file that is not an image, for different sizes, and for a mask that hides nothing or has
    transparent pixels.
    """
    if not image or not mask:
        missing, given = ("image", "mask") if not image else ("mask", "image")
        raise UserError(
            f"generate.{given} is set, but generate.{missing} is empty: a completion needs both", remedy="give --image FILE and --mask FILE"
        )
    files = {"image": _read("image", image), "mask": _read("mask", mask)}
    sides = {name: ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size for name, data in files.items()}
    if sides["image"] != sides["mask"]:
        raise UserError(
            f"generate.mask {mask!r} is {sides['mask'][0]} × {sides['mask'][1]} pixels, but generate.image {image!r} is "
            f"{sides['image'][0]} × {sides['image'][1]}",
            remedy="use a mask of the image's size",
        )
    if _has_transparent_pixels(Image.open(io.BytesIO(files["mask"]))):
        raise UserError(
            f"generate.mask {mask!r} has transparent pixels, which are ambiguous",
            remedy="use a mask without alpha: white where to draw, black where to keep",
        )
    hidden = decode(files["mask"], size, exif=True).max(axis=2) > HIDING
    if not hidden.any():
        raise UserError(
            f"generate.mask {mask!r} hides nothing: in the centre crop no pixel is brighter than {HIDING}",
            remedy="paint the area to draw white",
        )
    return Completion(decode(files["image"], size, exif=True), hidden, keep_pixels)


def _has_transparent_pixels(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    return image.mode.startswith("I") or image.convert("RGBA").getchannel("A").getextrema() != (255, 255)  # Pillow: 8 bits only


def _read(name: str, path: str) -> bytes:
    """The bytes of an image file, which was decoded as a check."""
    try:
        data = storage.read_bytes(path)
    except (OSError, UserError) as error:
        raise UserError(f"generate.{name} {path!r} can't be read: {error}") from error
    try:
        decode(data, 1)
    except ImageError as error:
        raise UserError(f"generate.{name} {path!r} can't be used: {error}") from error
    return data
