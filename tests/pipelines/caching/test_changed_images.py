"""Images that changed since a cache was made of them, as far as the source shows it: by name; and images that only seem to have changed."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from listening import Listening

from benchmarks.source_forms import encoded, write_tree, write_webdataset
from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.caching.stage import cache
from pipelines.images.listing import ImageListing, Images, keep_listing, kept_listing
from pipelines.images.settings import ImageSettings
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.settings import TokenizerSettings

IMAGES = {f"{'ab'[number % 2]}/{number:02d}.png": encoded(16, 16, number) + b"\0" for number in range(14)} | {"b/x.png": b"no image"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSettings:
    path = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    save_tokenizer(KLAutoencoder(KLConfig(channels=2, width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)), path)
    return TokenizerSettings(path=str(path))


@pytest.fixture(scope="module")
def made(ray_local: ClusterSettings, tokenizer: TokenizerSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images/ and a cache/ of them, four images a shard."""
    folder = tmp_path_factory.mktemp("made")
    images = ImageSettings(source=write_tree(folder / "images", IMAGES), size=16, max_rejected=0.2)
    cache(Images(images), tokenizer.path, CacheSettings(path=str(folder / "cache"), shard_images=4, batch=2), Stage("cache", ray_local))
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """Source and cache with their times of modification; the files of the source are another's copies."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def stage(ray_local: ClusterSettings) -> Listening:
    return Listening(ray_local)


def again(folder: Path, tokenizer: TokenizerSettings, stage: Listening, check: bool = False) -> list[str]:
    """Run the stage; returns what it said."""
    images = ImageSettings(source=str(folder / "images"), size=16, max_rejected=0.2)
    cache(Images(images), tokenizer.path, CacheSettings(path=str(folder / "cache"), shard_images=4, batch=2), stage, check)
    said, stage.said = stage.said, []
    return said


def change(path: Path, keep_time: bool = False) -> None:
    """Other bytes, as many as before."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # which decoders pass over
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if keep_time else 1)))


def test_an_image_of_the_same_size_and_other_bytes_is_named(copy: Path, tokenizer: TokenizerSettings, stage: Listening) -> None:
    kept = (copy / "cache" / "listing.arrow").read_bytes()
    for key in ("a/02.png", "b/11.png"):
        change(copy / "images" / key)
    os.utime(copy / "images" / "a" / "04.png")
    with pytest.raises(
        UserError, match=r"contains now: 2 changed \(a/02\.png, b/11\.png\); choose another cache\.path, delete that directory"
    ):
        again(copy, tokenizer, stage)
    assert (copy / "cache" / "listing.arrow").read_bytes() == kept


def test_a_copy_of_the_data_is_read_once_and_is_the_same_source(copy: Path, tokenizer: TokenizerSettings, stage: Listening) -> None:
    manifest = LatentCache(str(copy / "cache")).digest
    for path in (copy / "images").rglob("*.png"):
        os.utime(path)
    assert again(copy, tokenizer, stage) == [
        f"15 of 15 images are in files that were written after {copy}/cache was made; reading them again",
        "15 of 15 images that were read again are unchanged",
        f"{copy}/cache is complete",
    ]
    assert again(copy, tokenizer, stage) == [f"{copy}/cache is complete"]
    change(copy / "images" / "a" / "00.png")
    with pytest.raises(UserError, match=r"1 changed \(a/00\.png\)"):
        again(copy, tokenizer, stage)
    assert LatentCache(str(copy / "cache")).digest == manifest


def test_a_repaired_image_of_the_same_size_is_tried_again(copy: Path, tokenizer: TokenizerSettings, stage: Listening) -> None:
    path = copy / "images" / "b" / "x.png"
    path.write_bytes(b"no pixel")
    os.utime(path, ns=(1, 1))
    said = again(copy, tokenizer, stage)
    assert f"images that were rejected in {copy}/cache have been repaired; their shards are encoded again" in said
    assert storage.read_json(str(copy / "cache" / "shards" / "shard-00003.json"))["image_sha256"][-1] == storage.digest(b"no pixel")


def test_what_keeps_its_time_is_found_when_everything_is_read(copy: Path, tokenizer: TokenizerSettings, stage: Listening) -> None:
    assert again(copy, tokenizer, stage, check=True)[0] == "15 of 15 images that were read again are unchanged"
    change(copy / "images" / "a" / "06.png", keep_time=True)
    assert again(copy, tokenizer, stage) == [f"{copy}/cache is complete"]  # the source does not show it
    with pytest.raises(UserError, match=r"1 changed \(a/06\.png\)"):
        again(copy, tokenizer, stage, check=True)


def test_a_killed_run_goes_on_with_what_changed_in_shards_that_were_not_made(
    copy: Path, tokenizer: TokenizerSettings, stage: Listening
) -> None:
    for name in ("summary.json", "manifest.json", "shards/shard-00000.json", "shards/shard-00000.arrow"):
        (copy / "cache" / name).unlink()
    change(copy / "images" / "a" / "00.png")
    again(copy, tokenizer, stage)
    assert len(LatentCache(str(copy / "cache"))) == 14
    change(copy / "images" / "a" / "00.png")
    with pytest.raises(UserError, match=r"1 changed \(a/00\.png\)"):
        again(copy, tokenizer, stage)


def test_a_cache_of_before_is_complete_and_what_is_not_known_is_said(copy: Path, tokenizer: TokenizerSettings, stage: Listening) -> None:
    """Neither versions in its listing nor digests in its records."""
    kept = kept_listing(str(copy / "cache" / "listing.arrow"))
    assert kept is not None
    keep_listing(str(copy / "cache" / "listing.arrow"), ImageListing(ImageRows(kept.rows.table.drop_columns("version")), kept.class_names))
    for path in (copy / "cache" / "shards").glob("*.json"):
        record = storage.read_json(str(path))
        del record["image_sha256"]
        storage.write_json(str(path), record)
    change(copy / "images" / "a" / "00.png")
    for _ in range(2):
        said = again(copy, tokenizer, stage)
        assert "did not record modification times: images replaced by others of the same size are not detected" in said[0]
        assert said[1:] == [f"{copy}/cache is complete"]
    with pytest.raises(UserError, match=r"has no digests of 15 images: .* `mar verify --sample N`"):
        again(copy, tokenizer, stage, check=True)
    (copy / "images" / "a" / "00.png").write_bytes(encoded(16, 17))
    with pytest.raises(UserError, match=r"1 changed \(a/00\.png\)"):  # its size is another one
        again(copy, tokenizer, stage)


def test_an_image_in_a_tar_that_was_written_again(tokenizer: TokenizerSettings, stage: Listening, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_webdataset(tmp_path / "images", IMAGES)
    again(tmp_path, tokenizer, stage)
    write_webdataset(tmp_path / "images", IMAGES)
    assert "15 of 15 images that were read again are unchanged" in again(tmp_path, tokenizer, stage)[1]
    changed = bytearray(IMAGES["a/04.png"])
    changed[-1] ^= 1
    write_webdataset(tmp_path / "images", {**IMAGES, "a/04.png": bytes(changed)})
    with pytest.raises(UserError, match=r"1 changed \(train-000/a/04\)"):
        again(tmp_path, tokenizer, stage)


def test_versions_are_in_the_listing_and_not_in_what_is_made_of_it(copy: Path, tokenizer: TokenizerSettings, stage: Listening) -> None:
    kept = kept_listing(str(copy / "cache" / "listing.arrow"))
    assert kept is not None
    assert kept.rows.table.schema.field("version").type == pa.int64()
    times = [(copy / "images" / row.key).stat().st_mtime_ns for row in kept.rows]
    assert kept.rows.column("version").tolist() == times
    shutil.move(copy / "cache", copy / "first")
    for path in (copy / "images").rglob("*.png"):
        os.utime(path)
    again(copy, tokenizer, stage)
    for name in storage.list_files(str(copy / "first")):
        if name not in ("listing.arrow", "summary.json"):
            assert (copy / "first" / name).read_bytes() == (copy / "cache" / name).read_bytes(), name
