"""Listing, splitting, decoding and cropping images."""

import errno
import hashlib
import io
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.images.listing import list_images
from pipelines.images.pixels import decode, to_model, to_uint8
from pipelines.images.reading import read_image
from pipelines.images.settings import ImageSettings
from pipelines.runtime.errors import ImageError, UserError


def encoded(width: int, height: int, seed: int = 0, mode: str = "RGB", kind: str = "PNG") -> bytes:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode=mode).save(sink, kind)
    return sink.getvalue()


def write_tree(root: Path, *names: str) -> ImageSettings:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(4, 4))
    return ImageSettings(source=str(root), size=4)


def test_lists_class_folders_in_the_order_of_keys(tmp_path: Path) -> None:
    settings = write_tree(tmp_path, "dog/2.PNG", "cat/b/1.jpeg", "cat/a.webp", "dog/notes.txt", "top.png", ".git/x.png", "cat/._a.png")
    listing = list_images(settings)
    assert listing.class_names == ["cat", "dog"]
    assert [(row.key, row.label, row.held_out) for row in listing.rows] == [
        ("cat/a.webp", 0, False), ("cat/b/1.jpeg", 0, False), ("dog/2.PNG", 1, False),
    ]  # fmt: skip
    assert read_image(settings, listing.rows[2]) == encoded(4, 4)


def test_held_out_by_folder_numbers_the_classes_of_all_parts_together(tmp_path: Path) -> None:
    settings = write_tree(tmp_path, "train/cat/1.png", "train/emu/2.png", "extra/cat/3.png", "val/bee/4.png", "val/emu/5.png")
    listing = list_images(replace(settings, held_out_folder="val"))
    assert listing.class_names == ["bee", "cat", "emu"]
    assert [(row.key, row.label) for row in listing.train()] == [("extra/cat/3.png", 1), ("train/cat/1.png", 1), ("train/emu/2.png", 2)]
    assert [(row.key, row.label) for row in listing.held_out()] == [("val/bee/4.png", 0), ("val/emu/5.png", 2)]


def test_empty_class_folders_are_refused_or_classes_of_their_own(tmp_path: Path) -> None:
    settings = write_tree(tmp_path, "cat/1.png", "emu/2.png", "dog/notes.txt", ".bee/3.png")
    (tmp_path / "ant").mkdir()
    with pytest.raises(UserError) as error:
        list_images(settings)
    assert str(error.value) == (
        f"images.source {str(tmp_path)!r} has 2 class folders without images: ant (no files), dog (1 file, such as dog/notes.txt); add "
        "images, remove these folders or rename them with a leading dot (hidden folders are skipped), or set "
        "images.allow_empty_classes=true to keep them as classes"
    )
    listing = list_images(replace(settings, allow_empty_classes=True))
    assert listing.class_names == ["ant", "cat", "dog", "emu"]  # as torchvision numbers them
    assert [(row.key, row.label) for row in listing.rows] == [("cat/1.png", 1), ("emu/2.png", 3)]
    assert listing.remarks == [
        "skipped: 1 hidden folder (.bee), 1 file that is not an image, by extension (.txt 1)",
        "2 of 4 classes have no training image: ant, dog",
    ]


def test_what_a_tree_holds_beside_its_images_is_named(tmp_path: Path) -> None:
    settings = write_tree(
        tmp_path, "cat/1.png", "cat/deep/2.png", "cat/3.avif", "cat/4.AVIF", "README", "top.png", ".a/x.png", ".b/c/x.png"
    )
    assert list_images(settings).notes == (
        "skipped: 2 hidden folders (.a, .b), 1 image outside the class folders (top.png), "
        "3 files that are not images, by extension (.avif 2, none 1)",
    )
    for name in (".a", ".b", "README", "top.png", "cat/3.avif", "cat/4.AVIF"):
        (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}{name.replace('/', '-')}")
    assert list_images(settings).remarks == []


def test_a_class_that_one_part_lacks_is_no_empty_class(tmp_path: Path) -> None:
    settings = replace(write_tree(tmp_path, "train/cat/1.png", "val/bee/2.png", "val/cat/3.png", "val/.x/4.png"), held_out_folder="val")
    (tmp_path / "train" / "bee").mkdir()
    listing = list_images(settings)
    assert (listing.class_names, [row.label for row in listing.rows]) == (["bee", "cat"], [1, 0, 1])
    assert listing.remarks == ["skipped: 1 hidden folder (val/.x)", "1 of 2 classes has no training image: bee"]
    for part in ("train", "val"):
        (tmp_path / part / "emu").mkdir()
    with pytest.raises(UserError, match=r"has 1 class folder without images: emu \(no files\); "):
        list_images(settings)
    assert list_images(replace(settings, allow_empty_classes=True)).class_names == ["bee", "cat", "emu"]


def test_a_loop_of_links_is_named_and_a_link_outside_is_followed(tmp_path: Path) -> None:
    settings = write_tree(tmp_path / "source", "a/1.png", "b/deep/2.png")
    write_tree(tmp_path / "outside", "3.png")
    root = tmp_path / "source"
    (root / "a" / "more").symlink_to(tmp_path / "outside")
    (root / "c").symlink_to(root / "b")  # twice the same images, and no loop
    assert [row.key for row in list_images(settings).rows] == ["a/1.png", "a/more/3.png", "b/deep/2.png", "c/deep/2.png"]
    for link, target in {
        root / "b" / "deep" / "up": root / "b",
        root / "b" / "self": root / "b" / "self",
        root / "b" / "above": tmp_path,  # which holds the source
        root / "up": root,
        tmp_path / "outside" / "back": tmp_path / "outside",
    }.items():
        link.symlink_to(target)
        name = "a/more/back" if link.name == "back" else link.relative_to(root)
        with pytest.raises(UserError) as error:
            list_images(settings)
        assert str(error.value) == f"{root}/{name} is a link that leads to one of its parent folders; remove it"
        link.unlink()


def test_held_out_by_hash_of_the_key(tmp_path: Path) -> None:
    settings = write_tree(tmp_path, *(f"c/{number:03d}.png" for number in range(400)))
    small = {row.key for row in list_images(replace(settings, held_out_share=0.1)).held_out()}
    large = {row.key for row in list_images(replace(settings, held_out_share=0.3)).held_out()}
    assert small < large  # an image never comes back when the share grows
    assert 20 < len(small) < 60
    assert 90 < len(large) < 150
    digests = {key: int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) for key in large}
    assert all((digest < 0.1 * 2**32) == (key in small) for key, digest in digests.items())
    write_tree(tmp_path, "c/999.png", "a/000.png")  # nor when the source grows
    assert small <= {row.key for row in list_images(replace(settings, held_out_share=0.1)).held_out()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"source": ""}, "images.source '' does not exist"),
        ({"source": "{root}/nowhere"}, "nowhere' does not exist"),
        ({"source": "{root}/a"}, "holds no class folders"),
        ({"held_out_folder": "a"}, "holds no class folders with images; expected {root}/part/class/image"),
        ({"held_out_share": 1e-9}, "holds out none of the 2 images"),
        ({"held_out_share": 1.0}, "images.held_out_share is 1.0, expected"),
        ({"held_out_share": 0.5, "held_out_folder": "a"}, "clear one of the two"),
    ],
)
def test_sources_that_make_no_data_set(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    settings = write_tree(tmp_path, "a/1.png", "b/2.png")
    change = {name: value.format(root=tmp_path) if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(UserError) as error:
        list_images(replace(settings, **change))
    assert text.format(root=tmp_path) in str(error.value)


def test_held_out_folder_that_is_not_a_part(tmp_path: Path) -> None:
    settings = write_tree(tmp_path, "train/a/1.png", "val/a/2.png")
    with pytest.raises(UserError, match=r"'test' holds no images .* \['train', 'val'\]"):
        list_images(replace(settings, held_out_folder="test"))
    only = write_tree(tmp_path / "only", "val/a/1.png")
    with pytest.raises(UserError, match="expected some to train on"):
        list_images(replace(only, held_out_folder="val"))


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The definition of the reference page, word by word, in exact arithmetic."""
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    short = min(image.size)
    image = image.resize([round(Fraction(side * size, short)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def test_crop_follows_the_definition_on_random_sizes() -> None:
    draw = random.Random(0)
    for seed in range(40):
        width, height, size = draw.randint(3, 150), draw.randint(3, 150), draw.choice([7, 16, 32])
        data = encoded(width, height, seed)
        expected = np.asarray(adm_crop(Image.open(io.BytesIO(data)), size))
        found = decode(data, size)
        assert (found.shape, str(found.dtype)) == ((size, size, 3), "uint8")
        np.testing.assert_array_equal(found, expected, err_msg=f"{width}x{height} to {size}")


def test_crop_in_closed_form() -> None:
    data = encoded(24, 16)
    whole = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, 16), whole[:, 4:20])  # nothing to scale: the middle
    halves = np.asarray(Image.open(io.BytesIO(encoded(32, 32)))).reshape(16, 2, 16, 2, 3).astype(float).mean((1, 3))
    assert np.abs(decode(encoded(32, 32), 16) - halves).max() <= 1.0  # one halving: the mean of 2 × 2 pixels,
    # rounded once along each side


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGB", "BMP")])
def test_every_colour_mode_becomes_rgb(mode: str, kind: str) -> None:
    assert decode(encoded(9, 12, mode=mode, kind=kind), 8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a text\n", "UnidentifiedImageError: cannot identify image file"),
        (encoded(64, 64)[:6000], "OSError: image file is truncated"),
        (encoded(64, 64, kind="JPEG")[:900], "OSError: image file is truncated"),
    ],
)
def test_broken_images_raise_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        decode(data, 16)
    assert str(error.value).startswith(reason)
    assert "0x" not in str(error.value)


def test_a_source_that_does_not_answer_is_no_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = write_tree(tmp_path, "a/1.png")
    (row,) = list_images(settings).rows

    def failing(error: Exception) -> None:
        def read(*_: object) -> bytes:
            raise error

        monkeypatch.setattr("pipelines.images.sources.places.read", read)

    for error in (OSError(errno.EMFILE, "Too many open files"), OSError(errno.ESTALE, "Stale file handle"), OSError("AWS Error NETWORK")):
        failing(error)
        with pytest.raises(UserError, match=r"can't be read .*run the same command when it answers again"):
            read_image(settings, row)
    for error in (
        FileNotFoundError(errno.ENOENT, "gone"),
        OSError(errno.EIO, "sector"),
        OSError("Couldn't deserialize thrift"),
        pa.ArrowInvalid("damaged"),
    ):
        failing(error)
        with pytest.raises(ImageError, match="can't be read"):
            read_image(settings, row)


def test_very_long_images_are_refused_before_they_fill_the_memory() -> None:
    with pytest.raises(ImageError, match="1 × 3000 pixels: aspect ratio too extreme"):
        decode(encoded(1, 3000), 256)


def test_pixels_to_the_model_and_back() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    tensor = to_model(values)
    assert (tensor.shape, tensor.dtype) == ((1, 3, 16, 16), torch.float32)
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(tensor), values)
    outside = torch.tensor([-7.0, 7.0, float("nan")]).reshape(1, 3, 1, 1)
    assert to_uint8(outside).tolist() == [[[[0, 255, 0]]]]
