"""What is said of images that changed since an output was made of them, where only listings tell."""

import os
from pathlib import Path

import pytest
from listening import Listening

from benchmarks.source_forms import encoded, write_parquet, write_tree
from pipelines.evaluation.image_sets.sets import RealImages
from pipelines.images.listing import ImageListing, list_images
from pipelines.images.reading import read_image
from pipelines.images.settings import ImageSettings
from pipelines.images.source_changes import changes, check_source, remember_source
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError

IMAGES = {f"{'ab'[number % 2]}/{number:02d}.png": encoded(6, 6, number) for number in range(30)}


def listed(folder: Path, images: dict[str, bytes]) -> ImageListing:
    return list_images(ImageSettings(source=write_tree(folder, images)))


def test_keys_are_named_ten_of_each_kind_and_classes_by_their_names(tmp_path: Path) -> None:
    before = listed(tmp_path / "before", IMAGES)
    moved = {("aa" + key[1:] if key < "a/20" else key): data for key, data in IMAGES.items()} | {"b/01.png": b"other"}
    now = listed(tmp_path / "now", moved)  # a class between the others: each label of b is another number
    found = changes(before, now, before.rows, now.rows)
    assert (found.changed, len(found.added), len(found.missing)) == (["b/01.png"], 10, 10)
    assert str(found).startswith("1 changed (b/01.png); 10 added (aa/00.png, aa/02.png, ")
    fewer = listed(tmp_path / "fewer", {key: data for key, data in IMAGES.items() if key > "a/22"})
    assert str(changes(before, fewer, before.rows, fewer.rows)).endswith("a/18.png, …)")
    assert not changes(before, before, before.rows, before.rows)


def test_an_output_of_other_images_is_refused_by_key_and_touched_files_are_counted(tmp_path: Path) -> None:
    stage, source, path = Listening(ClusterSettings()), str(tmp_path / "images"), str(tmp_path / "output")
    listing = listed(tmp_path / "images", IMAGES)
    identity = {"images.size": 16, "images.listing": listing.digest}
    check_source(path, "tokenizer.path", source, listing, identity, stage)
    storage.write_json(f"{path}/identity.json", identity)
    remember_source(path, listing)
    check_source(path, "tokenizer.path", source, listing, identity, stage)
    assert stage.said == []
    os.utime(tmp_path / "images" / "a" / "00.png")
    touched = list_images(ImageSettings(source=source))
    remember_source(path, touched)
    check_source(path, "tokenizer.path", source, touched, identity, stage)
    assert stage.said == [
        f"1 of the 30 images of {source} are in files that were written after {path} was made from them, with "
        "unchanged sizes; whether their bytes have changed was not checked"
    ]
    now = listed(tmp_path / "images", {"a/00.png": b"other", "b/31.png": b"new"})
    with pytest.raises(UserError, match=rf"^{path} was made from other .* now: 1 changed \(a/00.png\); 1 added \(b/31.png\); choose"):
        check_source(path, "tokenizer.path", source, now, {**identity, "images.listing": now.digest}, stage)
    check_source(path, "tokenizer.path", source, now, {"images.size": 8, "images.listing": now.digest}, stage)  # `Stage.begin` refuses


def test_statistics_of_a_reference_are_those_of_its_bytes(tmp_path: Path) -> None:
    def reference(images: dict[str, bytes], exif: bool = False) -> RealImages:
        settings = ImageSettings(source=write_tree(tmp_path / "images", images), exif=exif)
        return RealImages(settings, list_images(settings).rows)

    first = reference(IMAGES)
    assert reference(IMAGES).identity() == first.identity()
    assert reference(IMAGES, exif=True).identity() != first.identity()
    same_size = reference({**IMAGES, "a/00.png": IMAGES["a/00.png"][:-1] + b"x"})
    assert same_size.identity() == first.identity()
    assert same_size.versions() != first.versions()
    assert reference({**IMAGES, "a/00.png": b"x"}).identity() != first.identity()


def test_a_parquet_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    settings = ImageSettings(source=write_parquet(tmp_path, IMAGES))
    assert [read_image(settings, row) for row in list_images(settings).rows] == [IMAGES[key] for key in sorted(IMAGES)]
    other = {key: data + b"x" for key, data in IMAGES.items()}
    write_parquet(tmp_path, other, row_group=4)
    assert [read_image(settings, row) for row in list_images(settings).rows] == [other[key] for key in sorted(other)]
