"""Section `images` of the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipelines.runtime.settings import Count, Share, ShareBelowOne, Whole, identity, operational


@dataclass
class ImageSettings:
    """Section `images`."""

    source: str = operational("", "folder tree SOURCE/class/*.jpg, tar, WebDataset or Parquet files; local or s3://")
    format: Literal["auto", "imagefolder", "ilsvrc", "webdataset", "parquet"] = operational(
        "auto", "form of the source; auto: detected from its files"
    )
    size: Count = identity(256, "side of the square centre crop, pixels")
    exif: bool = identity(False, "rotate images according to their EXIF orientation (torchvision's loader ignores it)")
    classes: Whole = identity(0, "number of classes of a source without class names; 0: the largest label + 1")
    allow_empty_classes: bool = operational(False, "class folders without images count as classes; off: they are an error")
    held_out_share: ShareBelowOne = identity(0.0, "share of images held out, chosen by a hash of the key")
    held_out_folder: str = identity("", "hold out one folder instead: SOURCE/<held_out_folder>/class/…; the other folders are for training")
    max_rejected: Share = operational(0.001, "largest share of unusable images before a stage fails")

    def relations(self) -> Iterator[tuple[str, str]]:
        """(field, error message) for values that contradict each other."""
        if self.held_out_share and self.held_out_folder:
            yield (
                "held_out_share",
                f"images.held_out_share is {self.held_out_share} and images.held_out_folder {self.held_out_folder!r}, expected only one of "
                "them: the split is by hash or by folder; clear one of the two",
            )
