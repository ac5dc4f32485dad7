"""Stage *cache* on a real Ray: the moments themselves, independence of workers, resume, rejects."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from listening import Listening
from PIL import Image

from benchmarks.source_forms import write_ilsvrc, write_parquet, write_tree, write_webdataset
from jobs.stages import guarded
from mar_model.tokenizers import KLAutoencoder, KLConfig, load_tokenizer, save_tokenizer
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.records import read_image_digests, read_record
from pipelines.caching.settings import CacheSettings
from pipelines.caching.stage import cache
from pipelines.caching.worker import EncodingJob, ShardEncoder
from pipelines.images.listing import Images, list_images
from pipelines.images.pixels import decode, to_model
from pipelines.images.reading import read_image
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import tokenizer_digest
from pipelines.tokenizing.settings import TokenizerSettings

SIZE, SHARD, BATCH = 16, 8, 3
BROKEN = {"b/20.png": b"", "b/22.png": b"not an image", "c/40.png": None}  # None: the first half of an image
REASONS = {"b/20.png": "empty file", "b/22.png": "UnidentifiedImageError: cannot identify", "c/40.png": "OSError: image file is truncated"}


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (18 + number % 5, 17 + number % 7, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSettings:
    """45 images of three classes, about a tenth held out; three can't be used."""
    source = tmp_path_factory.mktemp("source")
    for number in range(45):
        key = f"{'abc'[number // 15]}/{number:02d}.png"
        broken = BROKEN.get(key, png(number))
        (source / key).parent.mkdir(exist_ok=True)
        (source / key).write_bytes(png(number)[:400] if broken is None else broken)
    return ImageSettings(source=str(source), size=SIZE, held_out_share=0.1, max_rejected=0.1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSettings:
    path = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    save_tokenizer(KLAutoencoder(KLConfig(channels=3, width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)), path)
    return TokenizerSettings(path=str(path))


@pytest.fixture(scope="module")
def built(
    ray_local: ClusterSettings, images: ImageSettings, tokenizer: TokenizerSettings, tmp_path_factory: pytest.TempPathFactory
) -> CacheSettings:
    """A cache made by one encoder."""
    settings = CacheSettings(path=str(tmp_path_factory.mktemp("cache") / "one"), shard_images=SHARD, batch=BATCH, encoders=1)
    summary = cache(Images(images), tokenizer.path, settings, Stage("cache", ray_local))
    assert (summary["images"], summary["rejected"]) == (len(list_images(images).train()) - 3, 3)
    return settings


def contents(path: str) -> dict[str, bytes]:
    """Every file of a cache but the summary, which tells the time."""
    return {name: storage.read_bytes(storage.join(path, name)) for name in storage.list_files(path) if name != "summary.json"}


def copied(settings: CacheSettings, path: Path) -> CacheSettings:
    shutil.copytree(settings.path, path)
    return replace(settings, path=str(path))


def test_moments_are_the_tokenizers(built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings) -> None:
    found = LatentCache(built.path)
    rows = list_images(images).train()
    assert 0 < len(list_images(images).held_out()) < 10
    direct = load_tokenizer(Path(tokenizer.path)).to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(ClusterSettings().threads)
    expected: list[tuple[str, int, np.ndarray, np.ndarray]] = []
    try:
        for start in range(0, len(rows), SHARD):
            usable = [row for row in rows[start : start + SHARD] if row.key not in BROKEN]
            for first in range(0, len(usable), BATCH):
                batch = usable[first : first + BATCH]
                pixels = to_model(np.stack([decode(read_image(images, row), SIZE) for row in batch])).to(memory_format=torch.channels_last)
                with torch.inference_mode():
                    pairs = [direct.encode(one).numpy().astype(np.float16) for one in (pixels, pixels.flip(-1))]
                expected += [(row.key, row.label, *both) for row, *both in zip(batch, *pairs, strict=True)]
    finally:
        torch.set_num_threads(threads)
    everything = np.arange(len(found))
    assert found.keys(everything) == [key for key, *_ in expected]
    for mirrored in (False, True):
        moments, labels = found.take(everything, np.full(len(found), mirrored))
        assert labels.tolist() == [label for _, label, *_ in expected]
        np.testing.assert_array_equal(moments, np.stack([one[2 + mirrored] for one in expected]))
    assert not np.array_equal(found.take(everything, everything >= 0)[0], found.take(everything, everything < 0)[0])


def test_manifest_describes_the_whole(built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings) -> None:
    found = LatentCache(built.path)
    manifest = found.manifest
    assert (manifest.image_size, manifest.latent_size, manifest.latent_channels, manifest.dtype) == (16, 8, 3, "float16")
    assert manifest.class_names == ["a", "b", "c"]
    assert manifest.tokenizer["digest"] == tokenizer_digest(tokenizer.path)
    assert manifest.tokenizer["config"]["channels"] == 3
    assert (manifest.images["held_out_share"], manifest.images["held_out"]) == (0.1, len(list_images(images).held_out()))
    for shard in manifest.shards:
        data = storage.read_bytes(storage.join(built.path, "shards", shard["name"]))
        assert (shard["bytes"], shard["sha256"]) == (len(data), storage.digest(data))
    everything = np.arange(len(found))
    both = np.concatenate([found.take(everything, np.full(len(found), one))[0] for one in (False, True)]).astype(np.float64)
    means, variances, axes = both[:, :3], np.exp(both[:, 3:].clip(-30, 20)), (0, 2, 3)
    np.testing.assert_allclose(manifest.latent_mean, means.mean(axes), rtol=1e-12)
    np.testing.assert_allclose(manifest.latent_std, np.sqrt(means.var(axes) + variances.mean(axes)), rtol=1e-12)
    np.testing.assert_array_equal(manifest.latent_min, means.min(axes))
    np.testing.assert_array_equal(manifest.latent_max, means.max(axes))


def test_rejected_images_are_listed(built: CacheSettings, images: ImageSettings) -> None:
    rejected = pq.read_table(Path(built.path) / "rejected.parquet").to_pylist()
    assert [one["key"] for one in rejected] == list(BROKEN)
    for one in rejected:
        assert one["reason"].startswith(REASONS[one["key"]])
        assert one["sha256"] == storage.digest((Path(images.source) / one["key"]).read_bytes())


def test_three_encoders_on_two_cpus_write_the_same_bytes(
    built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    cache(Images(images), tokenizer.path, replace(built, path=str(tmp_path), encoders=3), stage)
    assert contents(str(tmp_path)) == contents(built.path)


def test_lost_and_damaged_shards_are_made_again_and_no_others(
    built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    again = copied(built, tmp_path / "copy")
    shards = tmp_path / "copy" / "shards"
    (shards / "shard-00000.arrow").unlink()
    damaged = bytearray((shards / "shard-00002.arrow").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (shards / "shard-00002.arrow").write_bytes(damaged)
    (shards / "shard-00003.json").write_bytes((shards / "shard-00003.json").read_bytes()[:40])
    for name in ("rejected.parquet", "listing.arrow"):
        (tmp_path / "copy" / name).unlink()
    (shards / "shard-00004.arrow.0a1b2c3d.partial").write_bytes(b"what a killed run left")
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    summary = cache(Images(images), tokenizer.path, again, stage)  # summary.json and manifest.json were there: files they name are not
    assert contents(again.path) == contents(built.path)
    made = {path.name for path in shards.iterdir() if path.stat().st_mtime_ns != before.get(path.name)}
    assert made == {f"shard-0000{number}.{kind}" for number in (0, 2, 3) for kind in ("arrow", "json")}
    assert summary["images"] == len(LatentCache(built.path))


def test_without_its_manifest_a_cache_is_no_cache_and_needs_no_work(
    built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    again = copied(built, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished latent cache"):
        LatentCache(again.path)
    summary = cache(Images(images), tokenizer.path, again, stage)
    assert contents(again.path) == contents(built.path)
    assert "images_per_second" in storage.read_json(storage.join(built.path, "summary.json"))
    assert not [name for name in summary if name == "images_per_second" or name.startswith("share_")]  # nothing was encoded


def test_a_complete_cache_says_so(
    built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(stage, "say", said.append)
    written = storage.read_json(storage.join(built.path, "summary.json"))
    assert cache(Images(images), tokenizer.path, replace(built, encoders=2), stage) == written
    assert said == [f"{built.path} is complete"]


@pytest.mark.parametrize("name", ["manifest.json", "listing.arrow", "rejected.parquet"])
def test_a_small_file_that_is_lost_or_damaged_is_made_again(
    name: str, built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    again = copied(built, tmp_path / "copy")
    file = tmp_path / "copy" / name
    if name == "rejected.parquet":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    cache(Images(images), tokenizer.path, again, stage)
    assert contents(again.path) == contents(built.path)


def test_the_output_of_another_stage_is_left_as_it_is(
    images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    for name in ("identity.json", "summary.json"):
        storage.write_json(str(tmp_path / name), {"train.batch": 2048})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds an output of another configuration"):
        cache(Images(images), tokenizer.path, CacheSettings(path=str(tmp_path)), stage)
    assert storage.read_json(str(tmp_path / "summary.json")) == {"train.batch": 2048}


def test_an_image_mended_in_its_parquet_file_is_tried_again(
    images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    pictures = {f"{'ab'[number // 6]}/{number:02d}.png": png(number) for number in range(12)}
    (tmp_path / "source").mkdir()
    source = write_parquet(tmp_path / "source", {**pictures, "a/04.png": b"broken"})
    settings = CacheSettings(path=str(tmp_path / "cache"), shard_images=4, batch=2)
    options = replace(images, source=source, held_out_share=0.0, max_rejected=0.2)
    assert cache(Images(options), tokenizer.path, settings, stage)["rejected"] == 1
    before = (tmp_path / "cache" / "shards" / "shard-00000.arrow").stat().st_mtime_ns
    write_parquet(tmp_path / "source", pictures)
    summary = cache(Images(options), tokenizer.path, settings, stage)
    assert (summary["rejected"], summary["images"]) == (0, 12)
    assert (tmp_path / "cache" / "shards" / "shard-00000.arrow").stat().st_mtime_ns == before
    write_parquet(tmp_path / "source", {**pictures, "b/07.png": png(99)})
    with pytest.raises(UserError, match=r"contains now: 1 changed \(train-00001/00000001\); choose another cache\.path"):  # not rejected
        cache(Images(options), tokenizer.path, settings, stage)
    write_parquet(tmp_path / "source", pictures, row_group=2)  # the same images, laid out otherwise
    assert cache(Images(options), tokenizer.path, settings, stage) == summary


@pytest.mark.long
def test_every_form_of_source_gives_the_same_moments(
    images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    pictures = {f"{'ab'[number // 6]}/{number:02d}.png": png(number) for number in range(12)}
    for folder in ("shards", "parquet"):
        (tmp_path / folder).mkdir()
    sources = {
        "imagefolder": write_tree(tmp_path / "tree", pictures), "ilsvrc": write_ilsvrc(tmp_path / "all.tar", pictures),
        "webdataset": write_webdataset(tmp_path / "shards", pictures), "parquet": write_parquet(tmp_path / "parquet", pictures),
    }  # fmt: skip
    found = []
    for form, source in sources.items():
        settings = CacheSettings(path=str(tmp_path / f"cache-{form}"), shard_images=SHARD, batch=1)
        cache(Images(replace(images, source=source, held_out_share=0.0)), tokenizer.path, settings, stage)
        made = LatentCache(settings.path)
        moments, labels = made.take(np.arange(12), np.zeros(12, bool))
        found.append(sorted((int(label), one.tobytes()) for label, one in zip(labels, moments, strict=True)))
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("images", "held_out_share", 0.2), ("images", "size", 8), ("cache", "dtype", "float32"), ("cache", "shard_images", 4)],
)
def test_another_identity_is_refused_by_name(
    built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, section: str, field: str, value: float
) -> None:
    changed = {"images": images, "cache": built}
    changed[section] = replace(changed[section], **{field: value})  # type: ignore[type-var]
    with pytest.raises(UserError, match=rf"{section}\.{field} \(found .*, expected {value!r}\)"):
        cache(Images(changed["images"]), tokenizer.path, changed["cache"], stage)  # type: ignore[arg-type]


def test_another_source_and_another_tokenizer_are_refused(
    built: CacheSettings, images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    shutil.copytree(images.source, tmp_path / "source")
    (tmp_path / "source" / "a" / "00.png").rename(tmp_path / "source" / "c" / "00.png")
    (tmp_path / "source" / "b" / "17.png").write_bytes(png(0) + b"x")
    (tmp_path / "source" / "b" / "18.png").unlink()
    with pytest.raises(UserError) as told:
        cache(Images(replace(images, source=str(tmp_path / "source"))), tokenizer.path, built, stage)
    assert str(told.value) == (
        f"{built.path} was made from other images than images.source {str(tmp_path / 'source')!r} contains now: 1 changed (b/17.png); 1 "
        "added "
        "(c/00.png); 2 missing (a/00.png, b/18.png); choose another cache.path, delete that directory to make it from these images, or "
        "restore the former images"
    )
    other = KLAutoencoder(KLConfig(channels=3, width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1))
    save_tokenizer(other, tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"differing settings: tokenizer\.digest"):
        cache(Images(images), str(tmp_path / "tokenizer"), built, stage)


def test_too_many_rejects_stop_the_stage_and_mended_images_resume_it(
    images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, built: CacheSettings, tmp_path: Path
) -> None:
    shutil.copytree(images.source, tmp_path / "source")
    strict = replace(images, source=str(tmp_path / "source"), max_rejected=0.03)  # 1 of about 40
    settings = copied(built, tmp_path / "cache")
    for name in ("summary.json", "manifest.json", "shards/shard-00001.json"):
        (tmp_path / "cache" / name).unlink()
    with pytest.raises(UserError, match=r"3 of \d+ images can't be used, but images.max_rejected=0.03 allows 1: b/20.png \(empty file\)"):
        cache(Images(strict), tokenizer.path, settings, stage)
    assert pq.read_table(tmp_path / "cache" / "rejected.parquet").num_rows == 3
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert (tmp_path / "cache" / "shards" / "shard-00001.json").exists()
    for key in ("b/20.png", "c/40.png"):
        (tmp_path / "source" / key).write_bytes(png(0))
    summary = cache(Images(strict), tokenizer.path, settings, stage)
    assert summary["rejected"] == 1
    assert summary["images"] == len(LatentCache(built.path)) + 2
    assert pq.read_table(tmp_path / "cache" / "rejected.parquet")["key"].to_pylist() == ["b/22.png"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "float64"}, "cache.dtype is 'float64', expected one of float16, float32"),
        ({"precision": "auto"}, "cache.precision is 'auto', expected one of float32, tf32, bf16"),
        ({"batch": 0}, "cache.batch is 0, expected a number above 0"),
    ],
)
def test_settings_that_make_no_cache(
    images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path, change: dict[str, object], text: str
) -> None:
    with pytest.raises(UserError) as error:
        cache(Images(images), tokenizer.path, CacheSettings(path=str(tmp_path / "cache"), **change), stage)  # type: ignore[arg-type]
    assert text in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_sizes_and_tokenizers_that_do_not_fit(images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path) -> None:
    settings = CacheSettings(path=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"images.size is 15, expected a multiple of 2"):
        cache(Images(replace(images, size=15)), tokenizer.path, settings, stage)
    with pytest.raises(UserError, match=r"is not a tokenizer .* run `mar tokenize` first"):
        cache(Images(images), str(tmp_path), settings, stage)


def test_what_a_source_holds_beside_its_images_is_printed(tokenizer: TokenizerSettings, ray_local: ClusterSettings, tmp_path: Path) -> None:
    for key in ("a/0.png", "b/1.png", ".c/2.png"):
        (tmp_path / "source" / key).parent.mkdir(parents=True)
        (tmp_path / "source" / key).write_bytes(png(0))
    (tmp_path / "source" / "bb").mkdir()
    stage, settings = Listening(ray_local), CacheSettings(path=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="1 class folder without images: bb"):
        cache(Images(ImageSettings(source=str(tmp_path / "source"), size=SIZE)), tokenizer.path, settings, stage)
    allowed = ImageSettings(source=str(tmp_path / "source"), size=SIZE, allow_empty_classes=True)
    assert cache(Images(allowed), tokenizer.path, settings, stage)["images"] == 2
    assert stage.said[:2] == ["skipped: 1 hidden folder (.c)", "1 of 3 classes has no training image: bb"]
    assert LatentCache(settings.path).manifest.class_names == ["a", "b", "bb"]


def test_moments_beyond_float16_reject_the_image(images: ImageSettings, tokenizer: TokenizerSettings, tmp_path: Path) -> None:
    rows = list_images(images).train()[:2]
    for dtype, left in (("float16", 1), ("float32", 2)):
        job = EncodingJob(images, tokenizer.path, str(tmp_path / dtype), 1, dtype, "float32", 1, ClusterSettings())
        encoder = ShardEncoder(job, rows)
        encode, calls = encoder.encoder.tokenizer.encode, iter([1e6, 1.0, 1.0, 1.0, 1.0, 1.0])  # the first image alone, not its mirror
        encoder.encoder.tokenizer.encode = lambda pixels, encode=encode, calls=calls: encode(pixels) * next(calls)  # type: ignore[method-assign,misc]
        record, _ = encoder.make(0, 0, 2)
        assert record == read_record(str(tmp_path / dtype / "shards" / "shard-00000.json"))
        assert read_image_digests(str(tmp_path / dtype), 0) == [storage.digest(read_image(images, row)) for row in rows]
        assert record["rows"] == left
        assert [one["reason"] for one in record["rejected"]] == ["the tokenizer's moments are not finite in float16"] * (2 - left)


def test_an_encoder_that_cannot_write_says_so_in_one_line(
    images: ImageSettings, tokenizer: TokenizerSettings, stage: Stage, tmp_path: Path
) -> None:
    blocked = tmp_path / "cache" / "shards" / "shard-00000.arrow"
    blocked.mkdir(parents=True)
    settings = CacheSettings(path=str(tmp_path / "cache"), shard_images=SHARD, batch=BATCH)
    with pytest.raises(UserError) as told:
        guarded("cache", settings.path, lambda: cache(Images(images), tokenizer.path, settings, stage))
    assert str(told.value).startswith(f"{blocked} can't be written: [Errno 21] Is a directory")
    assert "\n" not in str(told.value)
    blocked.rmdir()
    assert cache(Images(images), tokenizer.path, settings, stage)["shards"] > 1
