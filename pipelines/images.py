"""Images as they come from a source: rows of (key, encoded bytes, label), the centre crop, and the held-out split."""

from dataclasses import dataclass

from pipelines.settings import identity, operational


@dataclass
class ImageSettings:
    """Section `images`."""

    source: str = operational("", "ImageFolder tree: SOURCE/class/*.png|jpg (with held_out_folder: SOURCE/part/class/…)")
    size: int = identity(256, "side of the square centre crop, pixels")
    held_out_share: float = identity(0.0, "share of images held out, chosen by a hash of the key")
    held_out_folder: str = identity("", "hold out by folder instead: SOURCE/<held_out_folder>/class/…; the other folders train")
    max_rejected: float = operational(0.001, "largest share of unusable images before a stage fails")
