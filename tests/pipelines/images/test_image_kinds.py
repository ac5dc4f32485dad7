"""Images as they come: each kind is used as Pillow's RGB conversion has it, or rejected with its reason."""

import io
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.images.listing import list_images
from pipelines.images.pixels import decode
from pipelines.images.reading import decode_row
from pipelines.images.settings import ImageSettings
from pipelines.runtime.storage import digest

SIZE = 16


def pixels(height: int, width: int, channels: int, bits: int = 8, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 2**bits, (height, width, channels))
    return values.squeeze(-1).astype(f"uint{bits}") if channels == 1 else values.astype(f"uint{bits}")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def png(width: int, height: int, rows: bytes = b"\0", bits: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims this size; without `rows` it holds almost nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow can't write of more than one."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], rows, 16, colour)


def tiff(values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """An uncompressed greyscale TIFF of the byte order of `values`."""
    order, data = (">" if values.dtype.byteorder == ">" else "<"), values.tobytes()
    fields = {256: SIZE, 257: SIZE, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: SIZE, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in fields.items())
    header = struct.pack(order + "2sHI", b"MM" if order == ">" else b"II", 42, 8 + len(data))
    return header + data + struct.pack(order + "H", len(fields)) + entries + bytes(4)


def packed(values: np.ndarray) -> np.ndarray:
    """Numbers of 12 bits, two in three bytes."""
    first, second = values.reshape(-1, 2).astype(int).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)


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
    "bits1.png": saved(Image.fromarray(pixels(SIZE, SIZE, 1) > 99), "PNG"),
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
GREY = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)  # 0, 257, 514, … 65535
SMALL = np.linspace(0, 4095, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
LARGE = GREY.astype(np.uint32) * 65537
DEEP = {  # every one holds the greys 0, 1, 2, … 255
    "16.png": saved(Image.fromarray(GREY), "PNG"),
    "16-turned.png": saved(Image.fromarray(np.rot90(GREY)), "PNG", exif=ORIENTATION),
    "16-transparent.png": saved(Image.fromarray(GREY), "PNG", transparency=0),
    "16-little.tif": tiff(GREY.astype("<u2"), 16),
    "16-big.tif": tiff(GREY.astype(">u2"), 16),
    "16-lzw.tif": saved(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
    "16-white-is-zero.tif": tiff((65535 - GREY).astype("<u2"), 16, photometric=0),
    "16.jp2": saved(Image.fromarray(GREY), "JPEG2000"),
    "12.tif": tiff(packed(SMALL), 12),
    "32.tif": tiff(LARGE.astype("<u4"), 32),
    "65535.pgm": b"P5 16 16 65535\n" + GREY.astype(">u2").tobytes(),
    "4095.pgm": b"P5 16 16 4095\n" + SMALL.astype(">u2").tobytes(),
    "4095-plain.pgm": b"P2 16 16 4095\n" + " ".join(map(str, SMALL.ravel())).encode(),
    "rgb.png": png16(np.stack([GREY] * 3, 2), 2),
    "4095.ppm": b"P6 16 16 4095\n" + np.repeat(SMALL, 3).astype(">u2").tobytes(),
    "grey-alpha.png": png16(np.stack([GREY, GREY[::-1]], 2), 4),
    "rgba.png": png16(np.stack([GREY, GREY, GREY, GREY[::-1]], 2), 6),
}
FLOAT = "floating-point pixels have no defined white; convert the image to 8 or 16 bits"
BROKEN = {
    "float.tif": (tiff(GREY.astype("<f4"), 32, sample_format=3), FLOAT),
    "float.pgm": (b"Pf 16 16 -1.0\n" + np.linspace(0, 1, SIZE * SIZE).astype("<f4").tobytes(), FLOAT),
    "signed16.tif": (tiff(GREY.astype(">i2"), 16, sample_format=2), "signed integer pixels have no defined black"),
    "signed32.tif": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "signed integer pixels have no defined black"),
    "integers-of-im.png": (
        saved(Image.fromarray(GREY.astype(np.int32)), "IM"),
        "32-bit integer pixels (format IM) have no defined white",
    ),
    "bomb.png": (png(20_000, 20_000), "DecompressionBombError: Image size (400000000 pixels) exceeds limit of 178956970 pixels"),
    "long.png": (saved(Image.new("RGB", (1, 40_000)), "PNG"), "1 × 40000 pixels: aspect ratio too extreme for a square crop"),
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


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_scaled_by_their_nominal_range(name: str) -> None:
    expected = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    found = decode(DEEP[name], SIZE, exif=True)
    np.testing.assert_array_equal(found, np.repeat(expected[:, :, None], 3, axis=2))


def test_16_bits_are_rounded_to_the_nearest_of_8() -> None:
    for value, expected in {0: 0, 128: 0, 129: 1, 32767: 127, 32768: 128, 65406: 254, 65407: 255}.items():
        assert decode(saved(Image.fromarray(np.full((SIZE, SIZE), value, np.uint16)), "PNG"), SIZE)[0, 0].tolist() == [expected] * 3


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
    assert found.pop("leads-nowhere.png") == (None, "can't be read: FileNotFoundError", "")
    for name, (data, reason) in BROKEN.items():
        assert found[name].reason.startswith(reason), found[name].reason
        assert found[name].digest == digest(data)
    (tmp_path / "class" / "empty.jpg").unlink()  # between the listing and the reading
    vanished = next(row for row in rows if row.key.endswith("/empty.jpg"))
    assert decode_row(settings, vanished) == (None, "can't be read: FileNotFoundError", "")
