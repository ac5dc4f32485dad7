"""Section `images` of the configuration."""

from dataclasses import dataclass
from typing import Literal

from pipelines.runtime.errors import ImageError as ImageError
from pipelines.runtime.settings import identity, operational


@dataclass
class ImageSettings:
    """Section `images`."""

    source: str = operational("", "tree SOURCE/class/*.jpg, tar, WebDataset or Parquet files; local or s3://")
    format: Literal["auto", "imagefolder", "ilsvrc", "webdataset", "parquet"] = operational(
        "auto", "form of the source; auto: by what is there"
    )
    size: int = identity(256, "side of the square centre crop, pixels")
    exif: bool = identity(False, "turn images as their EXIF orientation says (torchvision's loader ignores it)")
    classes: int = identity(0, "number of classes of a source that only numbers them; 0: the largest label + 1")
    allow_empty_classes: bool = operational(False, "class folders without images are classes; off: they are an error")
    held_out_share: float = identity(0.0, "share of images held out, chosen by a hash of the key")
    held_out_folder: str = identity("", "hold out by folder instead: SOURCE/<held_out_folder>/class/…; the other folders train")
    max_rejected: float = operational(0.001, "largest share of unusable images before a stage fails")
