"""mar inspect and mar verify: what they find in a cache, whole and damaged."""

import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.source_forms import encoded, write_tree
from jobs.cache_commands import inspect_command, verify_command
from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer
from pipelines.caching.inspection.inspecting import EDGES, inspect
from pipelines.caching.inspection.verifying import damages
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.caching.stage import cache
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.settings import TokenizerSettings

IMAGES = {f"{'aab'[number % 3]}/{number:02d}.png": encoded(16, 17, number) for number in range(20)} | {"b/x.png": b"", "b/y.png": b"text"}


@pytest.fixture(scope="module")
def made(ray_local: ClusterSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images/, tokenizer/ and cache/."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    save_tokenizer(
        KLAutoencoder(KLConfig(channels=2, width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)), folder / "tokenizer"
    )
    images = ImageSettings(source=write_tree(folder / "images", IMAGES), size=16, max_rejected=0.2)
    tokenizer = TokenizerSettings(path=str(folder / "tokenizer"))
    configuration = {"images": vars(images), "tokenizer": vars(tokenizer)}
    settings = CacheSettings(path=str(folder / "cache"), shard_images=8, batch=3)
    cache(Images(images), tokenizer.path, settings, Stage("cache", ray_local, configuration))
    return folder


def test_inspection_counts(made: Path) -> None:
    found = inspect(str(made / "cache"))
    assert found.images.tolist() == [14, 6]
    assert found.rejected == Counter({"empty file": 1, "UnidentifiedImageError": 1})
    moments, _ = found.cache.take(np.arange(20), np.zeros(20, bool))
    manifest = found.cache.manifest
    latents = (moments[:, :2].astype(float) - np.reshape(manifest.latent_mean, (2, 1, 1))) / np.reshape(manifest.latent_std, (2, 1, 1))
    assert found.sampled == 20
    assert found.histogram.sum() == pytest.approx(1.0)
    assert found.histogram[: len(EDGES) // 2].sum() == pytest.approx((latents < 0).mean())


def test_inspect_prints_and_draws(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_command(str(made / "cache"))
    out = capsys.readouterr().out
    latents = "2 × 8 × 8 of 16 px images, float16"
    shown = ("20 in 3 shards", latents, "2, from 6 to 14 images", "2 images rejected", "1  empty file", "14  a")
    for text in shown:
        assert text in out, out
    with Image.open(io.BytesIO((made / "cache" / "inspect.png").read_bytes())) as picture:
        assert picture.width > 8 * 16


def test_verify_encodes_again_and_names_damage(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_command(str(made / "cache"), sample=20)
    out = capsys.readouterr().out
    assert "3 of 3 shards match the manifest" in out
    assert "✓ 20 images encoded again" in out

    other = tmp_path / "images"
    shutil.copytree(made / "images", other)
    for key in ("a/00.png", "b/05.png"):
        (other / key).write_bytes(encoded(16, 17, 99))
    with pytest.raises(Exception, match="1"):
        verify_command(str(made / "cache"), sample=20, source=str(other))
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1] for line in lines[2:]) == ["a/00.png", "b/05.png"]
    largest = float(lines[2].split()[0])
    assert lines[1].startswith(f"✗ 20 images encoded again: largest difference {largest:.2g} standard deviations (0.01")

    copy = tmp_path / "cache"
    shutil.copytree(made / "cache", copy)
    whole = {path.name: path.read_bytes() for path in (copy / "shards").glob("*.arrow")}
    (copy / "shards" / "shard-00000.arrow").unlink()
    (copy / "shards" / "shard-00001.arrow").write_bytes(whole["shard-00001.arrow"][:-1])
    (copy / "shards" / "shard-00002.arrow").write_bytes(bytes([whole["shard-00002.arrow"][0] ^ 1]) + whole["shard-00002.arrow"][1:])
    found = list(damages(LatentCache(str(copy))))
    assert [text.split()[1:3] for _, text in found] == [["is", "missing"], ["has", found[1][1].split()[2]], ["does", "not"]]
    with pytest.raises(Exception, match="1"):
        verify_command(str(copy))
    assert "0 of 3 shards" in capsys.readouterr().out


def test_what_verify_finds_the_next_run_makes_anew(made: Path, ray_local: ClusterSettings, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(made / "cache", copy)
    shards = copy / "shards"
    whole = {path.name: path.read_bytes() for path in shards.iterdir()}
    data = whole["shard-00001.arrow"]
    (shards / "shard-00001.arrow").write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])  # of the right length
    with pytest.raises(Exception, match="1"):
        verify_command(str(copy))
    images = ImageSettings(source=str(made / "images"), size=16, max_rejected=0.2)
    before = (shards / "shard-00000.arrow").stat().st_mtime_ns
    settings = CacheSettings(path=str(copy), shard_images=8, batch=3)
    cache(Images(images), str(made / "tokenizer"), settings, Stage("cache", ray_local))
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == whole
    assert (shards / "shard-00000.arrow").stat().st_mtime_ns == before
    verify_command(str(copy))


@pytest.mark.long
def test_verify_finds_another_source_and_another_tokenizer(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tree(tmp_path / "images", {key: encoded(16, 17, 100 + number) for number, key in enumerate(IMAGES)})
    with pytest.raises(Exception, match="1"):
        verify_command(str(made / "cache"), sample=4, source=other)
    assert "✗ 4 images encoded again" in capsys.readouterr().out
    save_tokenizer(KLAutoencoder(KLConfig(channels=2, width=8, multipliers=(1, 2))), tmp_path / "tokenizer")
    with pytest.raises(UserError, match="was made with the tokenizer of digest"):
        verify_command(str(made / "cache"), sample=4, tokenizer=str(tmp_path / "tokenizer"))
    first = next(iter(sorted(IMAGES)))
    (tmp_path / "images" / first).write_bytes(b"")
    with pytest.raises(UserError, match=rf"image {first} .* can no longer be used: empty file; the source has changed"):
        verify_command(str(made / "cache"), sample=4, source=other)


def test_precision_and_its_deviation_are_in_the_manifest(made: Path, ray_local: ClusterSettings, tmp_path: Path) -> None:
    manifest = LatentCache(str(made / "cache")).manifest
    assert manifest.precision["name"] == "float32"
    assert 0 <= manifest.precision["deviation"]["means_max"] < 1e-4
    images = ImageSettings(source=str(made / "images"), size=16, max_rejected=0.2)
    settings = CacheSettings(path=str(tmp_path), shard_images=8, batch=3, precision="bf16")
    cache(Images(images), str(made / "tokenizer"), settings, Stage("cache", ray_local))
    deviation = storage.read_json(str(tmp_path / "manifest.json"))["precision"]["deviation"]
    assert deviation["images"] == 3
    assert 1e-4 < deviation["means_rms"] < 0.1
    exact, rounded = (LatentCache(str(path)).take(np.arange(3), np.zeros(3, bool))[0].astype(float) for path in (made / "cache", tmp_path))
    std = np.std(exact[:, :2])
    assert np.abs(exact - rounded)[:, :2].max() / std < 2 * deviation["means_max"] + 0.01
