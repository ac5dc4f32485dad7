"""Samples of others as files: what is read, what is refused, and the file for ADM's suite."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation import npz
from pipelines.evaluation.image_sets.exporting import export_samples, interleaved
from pipelines.evaluation.image_sets.given import find_samples, npz_images
from pipelines.evaluation.reference_file import Reference, chosen_rows
from pipelines.generation.samples import Samples, write_samples
from pipelines.runtime.errors import UserError

COUNT, SIDE = 12, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)


def write_header(path: Path, descr: str, shape: str, data: bytes) -> str:
    """An `.npz` with a header that numpy would not write."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return str(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_in_pieces(tmp_path: Path, save) -> None:
    save(tmp_path / "samples.npz", PIXELS, arr_1=np.arange(COUNT))
    found = find_samples(str(tmp_path / "samples.npz"))
    assert (len(found), found.shape) == (COUNT, (SIDE, SIDE))
    blocks = [found.block(start, start + 5) for start in range(0, COUNT, 5)]
    index = np.concatenate([block.index for block in blocks])
    assert sorted(index) == list(range(COUNT))
    np.testing.assert_array_equal(np.concatenate([block.images for block in blocks]), PIXELS[index])
    np.testing.assert_array_equal(found.in_order().block(2, 4).images, PIXELS[2:4])
    np.testing.assert_array_equal(found.in_order().block(0, 2).images, PIXELS[:2])  # back, also where it is compressed
    assert (found.labels == -1).all()


BAD = {
    "floats": (lambda path: np.savez(path, PIXELS.astype(np.float32)), r"arr_0 in .* is float32 \(12, 8, 8, 3\); expected arr_0 of uint8"),
    "grey": (lambda path: np.savez(path, PIXELS[..., 0]), r"arr_0 in .* is uint8 \(12, 8, 8\)"),
    "one": (lambda path: np.savez(path, PIXELS[:1]), r"holds 1 image\(s\), expected 2 or more"),
    "none": (lambda path: np.savez(path, PIXELS[:0]), r"holds 0 image\(s\)"),
    "other": (lambda path: np.savez(path, images=PIXELS), r"holds the arrays images, expected arr_0"),
    "pickled": (lambda path: np.savez(path, np.array([{}], object)), r"is pickled, which could run code"),
    "negative": (lambda path: write_header(path, "'|u1'", "(-1, 8, 8, 3)", b"\0" * 400), r"\(-1, 8, 8, 3\)"),
    "short": (lambda path: write_header(path, "'|u1'", "(12, 8, 8, 3)", b"\0" * 400), r"has 400 bytes, its shape .* needs 2,304"),
    "text": (lambda path: Path(path).write_text("no archive"), r"can't be read as \.npz"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_npz_of_something_else_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    write, message = BAD[kind]
    write(tmp_path / "bad.npz")
    with pytest.raises(UserError, match=message) as caught:
        find_samples(str(tmp_path / "bad.npz"))
    assert "\n" not in str(caught.value)


def test_a_truncated_npz_is_damaged(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", PIXELS)
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.npz is damaged"):
        npz_images(str(tmp_path / "cut.npz"))


def write_folder(folder: Path, names: list[str]) -> str:
    for name, pixels in zip(names, PIXELS, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return str(folder)


def test_folders_flat_and_by_class(tmp_path: Path) -> None:
    flat = find_samples(write_folder(tmp_path / "flat", [f"{number:02d}.png" for number in range(COUNT)]))
    np.testing.assert_array_equal(flat.reader.take(np.arange(COUNT)), PIXELS)
    assert (flat.labels == -1).all()
    by_class = find_samples(write_folder(tmp_path / "classes", [f"{'ab'[number // 6]}/{number:02d}.png" for number in range(COUNT)]))
    np.testing.assert_array_equal(by_class.labels, np.arange(COUNT) // 6)
    halves = [by_class.block(start, start + 6) for start in (0, 6)]
    assert {2, 4} >= {int(block.labels.sum()) for block in halves}  # every part of the order holds both classes


def test_folders_that_hold_no_samples(tmp_path: Path) -> None:
    mixed = write_folder(tmp_path / "mixed", ["a.png", "b.png"])
    Image.fromarray(PIXELS[0, :4]).save(tmp_path / "mixed" / "c.png")
    with pytest.raises(UserError, match=r"different sizes: c\.png is 8 × 4 pixels, a\.png is 8 × 8 pixels"):
        find_samples(mixed).block(0, 3)
    (tmp_path / "mixed" / "c.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"c\.png can't be used: cannot identify image file"):
        find_samples(mixed).block(0, 3)
    (tmp_path / "empty").mkdir()
    for path, message in (("empty", "holds no images"), ("missing", "is not there"), ("missing.npz", "is not there")):
        with pytest.raises(UserError, match=message):
            find_samples(str(tmp_path / path))


def write_run(path: Path, labels: np.ndarray) -> str:
    for start in range(0, COUNT, 5):
        part = slice(start, start + 5)
        rows = np.arange(COUNT)[part]
        write_samples(str(path), Samples(start, rows, labels[part], PIXELS[part], np.zeros(len(rows), np.float32)))
    return str(path)


def test_a_run_is_exported_with_the_classes_in_turn(tmp_path: Path) -> None:
    labels = np.arange(COUNT) // 4  # class by class
    write_run(tmp_path / "run" / "evaluation", labels)
    summary = export_samples(str(tmp_path / "run"), str(tmp_path / "adm.npz"))
    assert (summary["samples"], summary["classes"]) == (COUNT, 3)
    with np.load(tmp_path / "adm.npz") as file:
        np.testing.assert_array_equal(file["arr_1"], np.arange(COUNT) % 3)
        order = np.array([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
        np.testing.assert_array_equal(file["arr_0"], PIXELS[order])
        assert file["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(interleaved(np.arange(7) % 3), np.arange(7))  # in turn already
    found = find_samples(str(tmp_path / "run" / "evaluation"))
    np.testing.assert_array_equal(found.reader.take(np.array([11, 0, 5])), PIXELS[[11, 0, 5]])
    (tmp_path / "run" / "evaluation" / "shards" / "samples-00000005-00000010.parquet").unlink()
    with pytest.raises(UserError, match="no shard with sample 5"):
        export_samples(str(tmp_path / "run"), str(tmp_path / "again.npz"))
    assert not (tmp_path / "again.npz").exists()
    with pytest.raises(UserError, match="holds no samples"):
        export_samples(str(tmp_path / "none"), str(tmp_path / "again.npz"))


def test_a_reference_says_which_part_is_missing(tmp_path: Path) -> None:
    mu, sigma = np.zeros(1280), np.eye(1280)
    np.savez(tmp_path / "fid_stats.npz", mu=mu, sigma=sigma)
    found = Reference.load(str(tmp_path / "fid_stats.npz"), "efficientnet-lite0")
    assert found.lacking.keys() == {"spatial", "features"}
    features = np.ones((5, 1280), np.float32)
    np.savez(tmp_path / "whole.npz", mu=mu, sigma=sigma, mu_s=np.zeros(343), sigma_s=np.eye(343), features=features)
    assert not Reference.load(str(tmp_path / "whole.npz"), "efficientnet-lite0").lacking
    features[3, 7] = np.nan
    np.savez(tmp_path / "nan.npz", mu=mu, sigma=sigma, features=features)
    with pytest.raises(UserError, match="features holds values that are not finite"):
        Reference.load(str(tmp_path / "nan.npz"), "efficientnet-lite0")
    with pytest.raises(UserError, match=r"mu has the shape \(1280,\), expected 2,048 values"):
        Reference.load(str(tmp_path / "whole.npz"), "inception")
    assert len(chosen_rows(50_000)) == len(set(chosen_rows(50_000))) == 10_000
    np.testing.assert_array_equal(chosen_rows(7), np.arange(7))


def test_an_npz_is_written_in_pieces_or_not_at_all(tmp_path: Path) -> None:
    file = str(tmp_path / "out.npz")
    with npz.writing(file) as writer:
        writer.rows("arr_0", PIXELS.shape, np.uint8, iter([PIXELS[:7], PIXELS[7:]]))
        writer.array("about", "text")
    with np.load(file) as found:
        np.testing.assert_array_equal(found["arr_0"], PIXELS)
        assert str(found["about"]) == "text"
    member = npz.member(file, "arr_0", "")
    data = Path(file).read_bytes()
    assert member.offset is not None
    assert data[member.offset : member.offset + PIXELS.nbytes] == PIXELS.tobytes()
    with pytest.raises(ValueError, match="7 rows of arr_0, expected 12"), npz.writing(str(tmp_path / "short.npz")) as writer:
        writer.rows("arr_0", PIXELS.shape, np.uint8, iter([PIXELS[:7]]))
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    assert io.BytesIO(data).getvalue()[:2] == b"PK"
