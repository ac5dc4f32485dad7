"""Images as they come from a source: rows of (key, encoded bytes, label), the centre crop, and the held-out split."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipelines import storage
from pipelines.errors import UserError
from pipelines.settings import identity, operational

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LARGEST_SCALED = 2**27  # pixels of the whole image at the scale of the crop: 384 MiB


@dataclass
class ImageSettings:
    """Section `images`."""

    source: str = operational("", "ImageFolder tree: SOURCE/class/*.png|jpg (with held_out_folder: SOURCE/part/class/…)")
    size: int = identity(256, "side of the square centre crop, pixels")
    held_out_share: float = identity(0.0, "share of images held out, chosen by a hash of the key")
    held_out_folder: str = identity("", "hold out by folder instead: SOURCE/<held_out_folder>/class/…; the other folders train")
    max_rejected: float = operational(0.001, "largest share of unusable images before a stage fails")


class ImageError(Exception):
    """An image that can't be used; its text is the reason."""


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image of the source. `key` is its path relative to the source, with '/'."""

    key: str
    label: int
    held_out: bool


@dataclass(frozen=True)
class ImageListing:
    """All images of a source, sorted by key; a label is the position of its folder's name in `class_names`."""

    rows: list[ImageRow]
    class_names: list[str]

    def train(self) -> list[ImageRow]:
        return [row for row in self.rows if not row.held_out]

    def held_out(self) -> list[ImageRow]:
        return [row for row in self.rows if row.held_out]

    @property
    def digest(self) -> str:
        """What tells this data from other data: the number of images, and the SHA-256 of keys, labels, split and class names."""
        text = json.dumps([self.class_names, [(row.key, row.label, row.held_out) for row in self.rows]])
        return f"{len(self.rows)} images, sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def list_images(settings: ImageSettings) -> ImageListing:
    """List an ImageFolder tree: SOURCE/class/…/image, with `held_out_folder` SOURCE/part/class/…/image.

    The classes are the sorted names of all class folders with at least one image, in whichever part. Hidden files and
    folders are passed over. Raises UserError when there is no source, no class folder, nothing to train on, or nothing
    held out although the settings ask for it.
    """
    _check_split(settings)
    source = settings.source
    if not source or not storage.exists(source):
        raise UserError(
            f"images.source {source!r} is not there; expected a folder (or s3://bucket/prefix) with one folder of images a class"
        )
    by_folder = settings.held_out_folder != ""
    depth = 3 if by_folder else 2  # components of the shortest key
    paths = [key.split("/") for key in storage.list_files(source, SUFFIXES)]
    paths = [path for path in paths if len(path) >= depth and not any(name.startswith(".") for name in path)]
    if not paths:
        layout = "part/class/image" if by_folder else "class/image"
        raise UserError(
            f"images.source {source!r} holds no class folders with images; expected {source}/{layout} "
            f"with {', '.join(SUFFIXES)}, found {storage.list_directory(source)[:5]}"
        )
    class_names = sorted({path[depth - 2] for path in paths})
    labels = {name: label for label, name in enumerate(class_names)}
    rows = []
    for path in paths:
        key = "/".join(path)
        held_out = path[0] == settings.held_out_folder if by_folder else _hash_share(key) < settings.held_out_share
        rows.append(ImageRow(key, labels[path[depth - 2]], held_out))
    listing = ImageListing(sorted(rows, key=lambda row: row.key), class_names)
    _check_parts(settings, listing)
    return listing


def _hash_share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, so that a growing source never moves an image to the other part."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32


def _check_split(settings: ImageSettings) -> None:
    if not 0.0 <= settings.held_out_share < 1.0:
        raise UserError(f"images.held_out_share is {settings.held_out_share}, expected a share from 0 up to, not including, 1")
    if settings.held_out_share and settings.held_out_folder:
        raise UserError(
            f"images.held_out_share is {settings.held_out_share} and images.held_out_folder {settings.held_out_folder!r}: "
            "the split is by hash or by folder; set one of them back"
        )


def _check_parts(settings: ImageSettings, listing: ImageListing) -> None:
    images, held_out = len(listing.rows), sum(row.held_out for row in listing.rows)
    if settings.held_out_folder and not held_out:
        raise UserError(
            f"images.held_out_folder {settings.held_out_folder!r} holds no images below {settings.source!r}; "
            f"the folders there are {sorted({row.key.split('/')[0] for row in listing.rows})}"
        )
    if settings.held_out_share and not held_out:
        raise UserError(
            f"images.held_out_share {settings.held_out_share} holds out none of the {images} images of {settings.source!r}; "
            "raise it, or bring more images"
        )
    if held_out == images:
        raise UserError(f"all {images} images of {settings.source!r} are held out, none is left to train on")


def read_image(settings: ImageSettings, row: ImageRow) -> bytes:
    """The encoded bytes of one image; raises OSError when they can't be read."""
    return storage.read_bytes(storage.join(settings.source, row.key))


def decode(data: bytes, size: int) -> np.ndarray:
    """Decode to RGB and crop to uint8 (size, size, 3). Raises ImageError with the reason where that is impossible."""
    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return centre_crop(image.convert("RGB"), size)
    except ImageError:
        raise
    except Exception as error:  # a decoder meets arbitrary bytes: Pillow raises OSError, ValueError, SyntaxError, struct.error, …
        text = str(error).split(" <_io.BytesIO")[0]  # no memory address: the reason is the same on every run
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
        raise ImageError(f"{image.width} × {image.height} pixels is too long for a square crop")
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].copy()


def to_model(images: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Float (N, 3, H, W) in [-1, 1] → uint8 (N, H, W, 3), rounded; values outside are clamped, NaN becomes black."""
    pixels = ((images.detach().float().nan_to_num(nan=-1.0) + 1.0) * 127.5).round().clamp(0, 255)
    return np.ascontiguousarray(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
