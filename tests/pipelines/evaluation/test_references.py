"""Real images that samples are compared with."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.evaluation.image_sets.sets import RealImages
from pipelines.evaluation.references.find import find_reference
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings

SIZE = 8


def test_a_folder_is_read_as_the_training_images_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # rotated a quarter clockwise to be seen
    for folder in ("source/a", "reference/a", "reference/empty"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "reference" / "a" / "1.png", exif=turned)
    found = {}
    for exif, expected in {False: pixels, True: np.rot90(pixels, -1)}.items():
        images = ImageSettings(source=str(tmp_path / "source"), size=SIZE, exif=exif)
        reference = find_reference(Images(images), "", EvaluateSettings(reference=str(tmp_path / "reference")), "any")
        assert isinstance(reference, RealImages)
        np.testing.assert_array_equal(reference.read(0, 1), expected[None])
        found[exif] = reference.identity()
    assert found[False] != found[True]  # statistics are kept by what they are of
