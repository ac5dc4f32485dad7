"""Images as they come: each kind is used as Pillow's RGB conversion has it, or rejected with its reason."""

import io
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.encoding import decode_row
from pipelines.images import ImageSettings, decode, list_images
from pipelines.storage import digest

SIZE = 16


def pixels(height: int, width: int, channels: int, bits: int = 8, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 2**bits, (height, width, channels))
    return values.squeeze(-1).astype(f"uint{bits}") if channels == 1 else values.astype(f"uint{bits}")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds almost nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


RGB = Image.fromarray(pixels(SIZE, SIZE, 3))
FRAMES = [Image.fromarray(pixels(SIZE, SIZE, 3, seed=seed)) for seed in range(3)]
ORIENTATION = Image.Exif()
ORIENTATION[0x0112] = 6  # turned a quarter clockwise to be seen
USABLE = {
    "cmyk.jpg": saved(Image.fromarray(pixels(SIZE, SIZE, 4), "CMYK"), "JPEG"),
    "grey.jpg": saved(Image.fromarray(pixels(SIZE, SIZE, 1)), "JPEG"),
    "grey-alpha.png": saved(Image.fromarray(pixels(SIZE, SIZE, 2), "LA"), "PNG"),
    "palette.png": saved(RGB.quantize(32), "PNG"),
    "palette-transparent.png": saved(RGB.quantize(32), "PNG", transparency=3),
    "bits16.png": saved(Image.fromarray(pixels(SIZE, SIZE, 1, 16)), "PNG"),
    "bits16.tif": saved(Image.fromarray(pixels(SIZE, SIZE, 1, 16)), "TIFF"),
    "alpha.png": saved(Image.fromarray(pixels(SIZE, SIZE, 4), "RGBA"), "PNG"),
    "alpha.webp": saved(Image.fromarray(pixels(SIZE, SIZE, 4), "RGBA"), "WEBP", lossless=True),
    "exif.jpg": saved(RGB, "JPEG", exif=ORIENTATION),
    "animated.gif": saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated.webp": saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
    "animated.png": saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "progressive.jpg": saved(RGB, "JPEG", progressive=True),
    "icc.jpg": saved(RGB, "JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "png-called.jpg": saved(RGB, "PNG"),
    "日本語 – ü.png": saved(RGB, "PNG"),
    unicodedata.normalize("NFD", "é.png"): saved(RGB, "PNG"),
    unicodedata.normalize("NFC", "é.png"): saved(RGB, "PNG"),
    "a 100% # ? & name.png": saved(RGB, "PNG"),
}
BROKEN = {
    "bomb.png": (png(20_000, 20_000), "DecompressionBombError: Image size (400000000 pixels) exceeds limit of 178956970 pixels"),
    "long.png": (saved(Image.new("RGB", (1, 40_000)), "PNG"), "1 × 40000 pixels is too long for a square crop"),
    "truncated.png": (saved(FRAMES[0], "PNG")[:400], "OSError: image file is truncated"),
    "truncated.jpg": (saved(Image.fromarray(pixels(64, 64, 3)), "JPEG")[:1500], "OSError: image file is truncated"),
    "header-alone.jpg": (saved(RGB, "JPEG")[:100], "OSError: Truncated File Read"),
    "empty.jpg": (b"", "empty file"),
    "page.jpg": (b"<html>404 not found</html>", "UnidentifiedImageError: cannot identify image file"),
    "damaged.png": (saved(RGB, "PNG")[:60] + b"\0" * 900, "OSError: broken data stream when reading image file"),
}


@pytest.mark.parametrize("name", USABLE)
def test_used_as_pillow_converts_to_rgb(name: str) -> None:
    with Image.open(io.BytesIO(USABLE[name])) as image:
        expected = np.asarray(image.convert("RGB"))
    assert expected.shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(decode(USABLE[name], SIZE), expected)  # of the crop's size: nothing is scaled


def test_exif_orientation_turns_the_image_when_asked() -> None:
    plain = decode(USABLE["exif.jpg"], SIZE)
    np.testing.assert_array_equal(decode(USABLE["exif.jpg"], SIZE, exif=True), np.rot90(plain, -1))
    assert not np.array_equal(np.rot90(plain, -1), plain)
    np.testing.assert_array_equal(decode(USABLE["grey.jpg"], SIZE, exif=True), decode(USABLE["grey.jpg"], SIZE))


def test_a_folder_of_all_kinds_rejects_exactly_the_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for name, data in {**USABLE, **{name: data for name, (data, _) in BROKEN.items()}}.items():
        (tmp_path / "class" / name).write_bytes(data)
    (tmp_path / "class" / "leads-nowhere.png").symlink_to(tmp_path / "nowhere.png")
    settings = ImageSettings(source=str(tmp_path), size=512)
    rows = list_images(settings).rows
    found = {row.key.partition("/")[2]: decode_row(settings, row) for row in rows}
    assert {name for name, one in found.items() if one.pixels is not None} == set(USABLE)
    assert found.keys() == {*USABLE, *BROKEN, "leads-nowhere.png"}
    assert found.pop("leads-nowhere.png") == (None, "the file can't be read", "")
    for name, (data, reason) in BROKEN.items():
        assert found[name].reason.startswith(reason), found[name].reason
        assert found[name].digest == digest(data)
    (tmp_path / "class" / "empty.jpg").unlink()  # between the listing and the reading
    vanished = next(row for row in rows if row.key.endswith("/empty.jpg"))
    assert decode_row(settings, vanished) == (None, "the file can't be read", "")
