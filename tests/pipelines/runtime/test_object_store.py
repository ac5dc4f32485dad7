"""Source, cache and loader on S3: moto's server on the loopback, in good and in bad order."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.faulty_s3 import FaultyS3
from benchmarks.source_forms import encoded, write_ilsvrc, write_parquet, write_tree, write_webdataset
from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.caching.stage import cache
from pipelines.caching.worker import EncodingJob, ShardEncoder
from pipelines.images.listing import Images, list_images
from pipelines.images.reading import read_image
from pipelines.images.settings import ImageSettings
from pipelines.runtime import s3, storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.training.data import LatentDataset

IMAGES = {f"{'ab'[number % 2]}/{number:02d} ü.png": encoded(16, 17, number) for number in range(30)}


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    import boto3

    with FaultyS3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": server.url,
        }.items():  # fmt: skip
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="data")
        yield server


@pytest.fixture
def impatient(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The server, and clients that give up sooner than in production."""
    monkeypatch.setattr(s3, "READ_SECONDS", 0.6)
    monkeypatch.setattr(s3, "WRITE_SECONDS", 0.6)
    monkeypatch.setattr(s3, "ATTEMPTS", 3)
    for cached in (s3._filesystem, s3._client):
        cached.cache_clear()
    server.stall = 0.9
    yield server
    server.share, server.methods = 0.0, ()
    for cached in (s3._filesystem, s3._client):
        cached.cache_clear()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    save_tokenizer(KLAutoencoder(KLConfig(channels=2, width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)), path)
    return str(path)


def upload(folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


def test_any_name_is_a_key_and_is_written_read_and_deleted(server: FaultyS3) -> None:
    for name in ("plain.bin", "a 100% # ? & +.png", "日本 é.png", "x%20y"):
        path = f"s3://data/names/{name}"
        storage.write_bytes(path, b"0123456789")
        assert storage.list_files("s3://data/names") == [name]
        assert (storage.read_range(path, 3, 4), storage.read_range(path, 8, 9), storage.size(path)) == (b"3456", b"89", 10)
        storage.delete(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("s3://data/names/absent")


def test_abandoned_uploads_are_taken_back(server: FaultyS3) -> None:
    import boto3

    client = boto3.client("s3")
    for key in ("kept/other.bin", "run/cache/shards/shard-00000.arrow"):
        upload_id = client.create_multipart_upload(Bucket="data", Key=key)["UploadId"]
        client.upload_part(Bucket="data", Key=key, UploadId=upload_id, PartNumber=1, Body=b"half of it")
    storage.delete_partial("s3://data/run/cache")
    left = client.list_multipart_uploads(Bucket="data").get("Uploads", [])
    assert [one["Key"] for one in left] == ["kept/other.bin"]
    assert not storage.exists("s3://data/run/cache/shards/shard-00000.arrow")


def test_a_local_copy_is_made_once_a_version_and_goes_with_its_process(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_copies", None)
    dead = Path(tempfile.gettempdir()) / f"{storage.COPIES}{2**22 + 1}-left"  # no process has such a number
    dead.mkdir(exist_ok=True)
    storage.write_bytes("s3://data/folder/sub/a.txt", b"one")
    first = storage.local_directory("s3://data/folder")
    requests = server.requests
    assert (storage.local_directory("s3://data/folder"), (first / "sub" / "a.txt").read_bytes()) == (first, b"one")
    assert server.requests - requests <= 2  # the listing alone
    storage.write_bytes("s3://data/folder/sub/a.txt", b"another")
    assert (storage.local_directory("s3://data/folder") / "sub" / "a.txt").read_bytes() == b"another"
    assert f"{storage.COPIES}{os.getpid()}-" in str(first)
    assert not dead.exists()


def test_every_form_of_source_on_s3(server: FaultyS3, tmp_path: Path) -> None:
    forms = {}
    for form, write in {"tree": write_tree, "webdataset": write_webdataset, "parquet": write_parquet, "ilsvrc": write_ilsvrc}.items():
        folder = tmp_path / form
        folder.mkdir()
        source = write(folder / "train.tar" if form == "ilsvrc" else folder, IMAGES)  # type: ignore[operator]
        upload(folder, f"s3://data/{form}")
        forms[form] = source.replace(str(tmp_path), "s3://data")
    for source in forms.values():
        settings = ImageSettings(source=source, size=16)
        rows = list_images(settings).rows
        assert [read_image(settings, row) for row in rows] == [IMAGES[key] for key in sorted(IMAGES)]


def test_an_objects_version_is_that_of_its_bytes(server: FaultyS3) -> None:
    for key in ("a/1.png", "a/b/2.png", "c/3.png", "top.txt"):
        storage.write_bytes(f"s3://data/versions/{key}", key.encode())
    first = {key: (size, version) for key, size, version in s3.list_objects("s3://data/versions")}
    assert {key: size for key, (size, _) in first.items()} == {"a/1.png": 7, "a/b/2.png": 9, "c/3.png": 7, "top.txt": 7}
    assert storage.size_and_version("s3://data/versions/a/1.png") == first["a/1.png"]
    storage.write_bytes("s3://data/versions/a/1.png", b"a/1.png")
    storage.write_bytes("s3://data/versions/c/3.png", b"c/4.png")
    second = {key: (size, version) for key, size, version in s3.list_objects("s3://data/versions")}
    assert {key for key in first if first[key] != second[key]} == {"c/3.png"}
    with pytest.raises(FileNotFoundError):
        storage.size_and_version("s3://data/versions/absent")
    settings = ImageSettings(source="s3://data/versions", size=16)
    assert list_images(settings).rows.column("version").tolist() == [second[key][1] for key in ("a/1.png", "a/b/2.png", "c/3.png")]


def test_a_tar_of_small_members_is_listed_with_few_requests(server: FaultyS3, tmp_path: Path) -> None:
    images = {f"a/{number:03d}.png": encoded(60, 60, number) for number in range(150)}  # 1.6 MB of noise
    pattern = write_webdataset(tmp_path, images, shards=1).replace("{000..000}", "000")
    upload(tmp_path, "s3://data/few")
    before = server.requests
    rows = list_images(ImageSettings(source=f"s3://data/few/{Path(pattern).name}", size=16)).rows
    assert server.requests - before < 15
    assert [read_image(ImageSettings(source="s3://data/few/train-000.tar"), row) for row in rows] == [images[key] for key in sorted(images)]


@pytest.fixture(scope="module")
def s3_source(server: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSettings, ImageSettings]:
    """The same images on S3 and on the disk."""
    folder = tmp_path_factory.mktemp("source")
    local = ImageSettings(source=write_tree(folder, IMAGES), size=16)
    upload(folder, "s3://data/source")
    return replace(local, source="s3://data/source"), local


@pytest.mark.long
def test_faults_change_no_byte_and_what_never_recovers_leaves_nothing(
    impatient: FaultyS3, s3_source: tuple[ImageSettings, ImageSettings], tokenizer: str, tmp_path: Path
) -> None:
    on_s3, local = s3_source
    rows = list_images(local).rows
    job = EncodingJob(local, tokenizer, str(tmp_path), 8, "float16", "float32", 4, ClusterSettings())
    ShardEncoder(job, rows).make(0, 0, 30)
    impatient.share = 0.12
    before = sum(impatient.faults.values())
    ShardEncoder(replace(job, images=on_s3, path="s3://data/made"), list_images(on_s3).rows).make(0, 0, 30)
    assert sum(impatient.faults.values()) - before >= 4  # of each kind
    names = ["shard-00000.arrow", "shard-00000.json"]
    for name in names:
        assert storage.read_bytes(f"s3://data/made/shards/{name}") == (tmp_path / "shards" / name).read_bytes()

    impatient.share, impatient.kinds = 1.0, ("503",)
    with pytest.raises(UserError, match=r"images\.source 's3://data/source' can't be read \(a/00 ü\.png: .*finished work is kept"):
        ShardEncoder(replace(job, images=on_s3, path=str(tmp_path / "other")), rows).make(0, 0, 30)
    impatient.methods = ("PUT",)
    with pytest.raises(UserError, match=r"s3://data/lost/shards/shard-00000\.arrow can't be written: not accepted in 3 attempts"):
        ShardEncoder(replace(job, path="s3://data/lost"), rows).make(0, 0, 30)
    impatient.share = 0.0
    assert storage.list_files("s3://data/lost") == []


@pytest.mark.long
def test_the_stage_and_the_loader_on_s3(
    server: FaultyS3, ray_local: ClusterSettings, s3_source: tuple[ImageSettings, ImageSettings], tokenizer: str, tmp_path: Path
) -> None:

    on_s3, local = s3_source
    storage.write_bytes("s3://data/cache/shards/nothing", b"")
    for settings, path in ((on_s3, "s3://data/cache"), (local, str(tmp_path / "cache"))):
        options = CacheSettings(path=path, shard_images=4, batch=4)
        assert cache(Images(settings), tokenizer, options, Stage("cache", ray_local))["images"] == 30
    names = ["manifest.json", *(f"shards/shard-0000{number}.arrow" for number in range(8))]
    for name in names:
        assert storage.read_bytes(f"s3://data/cache/{name}") == (tmp_path / "cache" / name).read_bytes()

    size = max(storage.size(f"s3://data/cache/{name}") for name in names[1:])
    with pytest.raises(UserError, match=r"fits 4 of the 8 shards .* train\.shuffle_window from 1 to 3"):
        LatentDataset(LatentCache("s3://data/cache", str(tmp_path / "local"), 4.5 * size / 1e9), seed=3)
    far = LatentCache("s3://data/cache", str(tmp_path / "local"), 4.5 * size / 1e9)
    near, whole = LatentDataset(LatentCache(str(tmp_path / "cache")), seed=3, window=2), LatentDataset(far, seed=3, window=2)
    assert far.local is not None
    for mine, theirs, _ in zip(whole.batches(0, 5), near.batches(0, 5), range(15), strict=False):
        assert torch.equal(mine.moments, theirs.moments)
        assert torch.equal(mine.labels, theirs.labels)
        assert sum(path.stat().st_size for path in far.local.folder.iterdir()) <= 4.5 * size
    np.testing.assert_array_equal(far.labels(), LatentCache(str(tmp_path / "cache")).labels())
    fetched = next(far.local.folder.iterdir())
    storage.write_bytes(f"s3://data/cache/shards/{fetched.name}", b"other bytes")
    for path in far.local.folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"shard-0000.\.arrow of s3://data/cache has the SHA-256 .*run `mar cache` with the same settings"):
        LatentCache("s3://data/cache", str(tmp_path / "local"), 4.5 * size / 1e9).labels()
