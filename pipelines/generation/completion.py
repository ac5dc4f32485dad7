"""An image of which a part is drawn anew: the picture and the mask that a person gives, as the model takes them."""

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

HIDING = 127  # a mask's pixels brighter than this are drawn anew


@dataclass(frozen=True)
class Completion:
    """A picture cropped to the model's size, and which of its pixels are to be drawn anew."""

    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) bool
    keep_pixels: bool

    @property
    def identity(self) -> dict[str, Any]:
        """Whatever files they came from."""
        return {"image": storage.digest(self.image.tobytes()), "mask": storage.digest(self.mask.tobytes())}

    def fill(self, side: int) -> Tensor:
        """The tokens that the mask touches, of side × side: (side, side) bool."""
        pixels = self.mask.shape[0] // side
        return torch.from_numpy(self.mask.reshape(side, pixels, side, pixels).any(axis=(1, 3)))

    def known(self, tokenizer: Tokenizer, device: torch.device) -> Tensor:
        """The picture's latents in the tokenizer's own scale, (1, C, h, w): the means of their posterior."""
        return tokenizer.moments(to_model([self.image]).to(device)).chunk(2, dim=1)[0]

    def restored(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (N, H, W, 3) with the given picture's own pixels where the mask is black, if they are to be kept."""
        return np.where(self.mask[:, :, None], images, self.image) if self.keep_pixels else images

    def shown(self) -> np.ndarray:
        """The picture with grey where something is to be drawn, (H, W, 3) uint8."""
        return np.where(self.mask[:, :, None], np.uint8(128), self.image)


def read_completion(image: str, mask: str, keep_pixels: bool, size: int) -> Completion:
    """Read both files, rotate each as its EXIF orientation states, and crop them alike to size × size, the way the training images were.

    Raises UserError for a file that is missing or no image, for two of different sizes, and for a mask that hides nothing or has
    transparent pixels.
    """
    if not image or not mask:
        missing, given = ("image", "mask") if not image else ("mask", "image")
        raise UserError(f"generate.{given} is given without generate.{missing}: a completion takes both (--image FILE --mask FILE)")
    files = {"image": _read("image", image), "mask": _read("mask", mask)}
    sides = {name: ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size for name, data in files.items()}
    if sides["image"] != sides["mask"]:
        raise UserError(
            f"generate.mask {mask!r} is {sides['mask'][0]} × {sides['mask'][1]} pixels, generate.image {image!r} is "
            f"{sides['image'][0]} × {sides['image'][1]}",
            remedy="give a mask of the image's size",
        )
    if _has_transparent_pixels(Image.open(io.BytesIO(files["mask"]))):
        raise UserError(
            f"generate.mask {mask!r} has transparent pixels, which could mean draw or keep",
            remedy="give a mask without alpha, painted white what to draw",
        )
    hidden = decode(files["mask"], size, exif=True).max(axis=2) > HIDING
    if not hidden.any():
        raise UserError(
            f"generate.mask {mask!r} hides nothing: inside the centre crop no pixel is brighter than {HIDING}",
            remedy="paint white what to draw",
        )
    return Completion(decode(files["image"], size, exif=True), hidden, keep_pixels)


def _has_transparent_pixels(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    return image.mode.startswith("I") or image.convert("RGBA").getchannel("A").getextrema() != (255, 255)  # Pillow finds none in 16 bits


def _read(name: str, path: str) -> bytes:
    """The bytes of a file that decodes."""
    try:
        data = storage.read_bytes(path)
    except (OSError, UserError) as error:
        raise UserError(f"generate.{name} {path!r} can't be read: {error}") from error
    try:
        decode(data, 1)
    except ImageError as error:
        raise UserError(f"generate.{name} {path!r} can't be used: {error}") from error
    return data
