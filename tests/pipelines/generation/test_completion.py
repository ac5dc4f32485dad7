"""The picture and the mask of a completion, as they are read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.generation.completion import read_completion
from pipelines.runtime.errors import UserError

SIZE = 16
GREY = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)  # 0, 257, 514, … 65535
TURNED = Image.Exif()
TURNED[0x0112] = 6  # rotated a quarter clockwise to be seen


def saved(path: Path, pixels: np.ndarray, **options: object) -> str:
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def test_16_bits_are_scaled_in_the_picture_and_in_the_mask(tmp_path: Path) -> None:
    picture, mask = saved(tmp_path / "picture.png", GREY), saved(tmp_path / "mask.png", GREY)
    found = read_completion(picture, mask, True, SIZE)
    np.testing.assert_array_equal(found.image, np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE, 1).repeat(3, 2))
    np.testing.assert_array_equal(found.mask, np.arange(256).reshape(SIZE, SIZE) > 127)


def test_a_photo_that_lies_on_its_side_is_used_as_viewers_show_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, 2 * SIZE, 3), dtype=np.uint8)
    upright = np.rot90(pixels, -1)
    painted = np.zeros(upright.shape[:2], np.uint8)
    painted[SIZE:] = 255
    found = read_completion(
        saved(tmp_path / "photo.png", pixels, exif=TURNED), saved(tmp_path / "mask.png", painted), keep_pixels=True, size=SIZE
    )
    np.testing.assert_array_equal(found.image, upright[SIZE // 2 : SIZE // 2 + SIZE])
    np.testing.assert_array_equal(found.mask, np.arange(SIZE)[:, None].repeat(SIZE, 1) >= SIZE // 2)


def test_masks_that_say_nothing_are_refused(tmp_path: Path) -> None:
    picture = saved(tmp_path / "picture.png", GREY)
    clear = np.full((SIZE, SIZE, 4), 255, np.uint8)  # white all over: all would be drawn
    clear[:4, :, 3] = 0
    cases = {
        "clear.png": (clear, {}, "has transparent pixels"),
        "clear-16.png": (GREY, {"transparency": 257}, "has transparent pixels"),
        "float.tif": (GREY.astype(np.float32), {}, "can't be used: floating-point pixels have no defined white"),
        "ones.png": ((GREY > 9).astype(np.uint8), {}, "hides nothing"),
    }
    for name, (pixels, options, reason) in cases.items():
        mask = saved(tmp_path / name, pixels, **options)
        with pytest.raises(UserError, match=rf"generate\.mask '.*{name}' {reason}"):
            read_completion(picture, mask, True, SIZE)
    opaque = np.full((SIZE, SIZE, 4), 255, np.uint8)
    assert read_completion(picture, saved(tmp_path / "opaque.png", opaque), True, SIZE).mask.all()
