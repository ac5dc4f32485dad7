import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_run import CLASSES, SIZE, write_checkpoint, write_tokenizer

from pipelines import samples
from pipelines.cluster import ClusterSettings
from pipelines.errors import UserError
from pipelines.generation import GenerateSettings, LoadedModel, generate, plan_drawing, share_out_of_range
from pipelines.images import ImageSettings, list_images
from pipelines.stage import Stage
from pipelines.tokenizing import TokenizerSettings
from pipelines.training import TrainSettings

IMAGES = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSettings:
    return TokenizerSettings(path=write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def checkpoint(tokenizer: TokenizerSettings, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer.path)


@pytest.fixture
def settings(checkpoint: str, tmp_path: Path) -> GenerateSettings:
    return GenerateSettings(
        path=str(tmp_path / "samples"),
        checkpoint=checkpoint,
        images=IMAGES,
        ar_steps=4,
        diffusion_steps=5,
        guidance=2.0,
        precision="float32",
        batch=5,
    )


class TalkingStage(Stage):
    """An untracked stage that remembers what it said."""

    def __init__(self, cluster: ClusterSettings) -> None:
        super().__init__("test", cluster)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def stage(ray_local: ClusterSettings) -> TalkingStage:
    return TalkingStage(ray_local)


def drawn(path: str) -> tuple[np.ndarray, np.ndarray]:
    parts = [samples.read_samples(path, *shard) for shard in samples.shards_there(path)]
    return np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])


def files(path: str) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.suffix in (".parquet", ".png")}


def test_generate_writes_shards_files_and_a_picture_and_resumes_to_the_same_bytes(
    settings: GenerateSettings, tokenizer: TokenizerSettings, stage: TalkingStage
) -> None:
    summary = generate(tokenizer, TrainSettings(), settings, 7, stage)
    assert (summary["images"], summary["out_of_range"], summary["images_seen"]) == (IMAGES, 0, 640)
    whole = files(settings.path)
    images, labels = drawn(settings.path)
    assert labels.tolist() == [index % 3 for index in range(IMAGES)]
    assert images.shape == (IMAGES, SIZE, SIZE, 3)
    assert np.ptp(images[0].astype(int)) > 20  # a picture, not a constant

    listing = list_images(ImageSettings(source=f"{settings.path}/images", size=SIZE))  # an image source again
    assert listing.class_names == CLASSES
    assert len(listing.rows) == IMAGES
    with Image.open(f"{settings.path}/images/bee/sample-00000004.png") as file:
        np.testing.assert_array_equal(np.asarray(file), images[4])
    with Image.open(f"{settings.path}/samples.png") as picture:
        assert picture.size == (4 * 66 + 2, 3 * 66 + 2)  # 4 columns, a row a class, enlarged to 64 pixels

    assert generate(tokenizer, TrainSettings(), settings, 7, stage) == summary
    assert stage.said == [f"{settings.path} is complete"]

    # as if killed before the second shard was written
    for name in ("summary.json", "samples.png", "shards/samples-00000005-00000010.parquet", "images/bee/sample-00000007.png"):
        (Path(settings.path) / name).unlink()
    again = generate(tokenizer, TrainSettings(), settings, 7, stage)
    assert files(settings.path) == whole
    assert again["seconds_per_image"] > 0

    with pytest.raises(UserError, match=r"seed \(there: 7, asked for: 8\)"):
        generate(tokenizer, TrainSettings(), settings, 8, stage)


def test_samples_depend_on_neither_batch_nor_actors(settings: GenerateSettings, tokenizer: TokenizerSettings, stage: TalkingStage) -> None:
    at_once = LoadedModel(plan_drawing(settings.path, [], tokenizer, TrainSettings(), settings, 7, stage.cluster, files=False))
    expected, _ = at_once.images(np.arange(IMAGES) % 3, range(IMAGES))  # one batch, in this process
    generate(tokenizer, TrainSettings(), replace(settings, batch=4, actors=2), 7, stage)
    images, _ = drawn(settings.path)
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1
    assert np.abs(images[0].astype(int) - images[3].astype(int)).max() > 20  # same class, another sample


def test_a_resume_with_another_batch_draws_only_what_is_missing() -> None:
    assert samples.shards_to_draw(20, 8, []) == [(0, 8), (8, 16), (16, 20)]
    assert samples.shards_to_draw(20, 3, [(0, 8), (16, 20)]) == [(8, 11), (11, 14), (14, 16)]
    assert samples.shards_to_draw(20, 3, [(0, 20)]) == []


def test_shards_open_elsewhere_as_pictures(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    samples.write_samples(str(tmp_path), samples.Samples(3, np.array([1, 0]), images, np.zeros(2, np.float32)))
    table = pq.read_table(tmp_path / "shards" / "samples-00000003-00000005.parquet")
    assert table.column_names == ["image", "index", "label", "key", "out_of_range"]
    row = table.to_pylist()[1]
    assert (row["index"], row["label"], row["key"]) == (4, 0, "sample-00000004")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), images[1])
    assert b'"image": {"_type": "Image"}' in table.schema.metadata[b"huggingface"]


def test_what_counts_as_out_of_range() -> None:
    latents = torch.zeros(4, 2, 2, 2)
    latents[1, 0, 0, 0] = 5.9  # within half the width of [-2, 4]
    latents[2, 0, 0, 0] = 7.1
    latents[3, 1] = torch.tensor([[float("nan"), 9.0], [-9.0, 0.0]])
    shares = share_out_of_range(latents, torch.tensor([-2.0, -1.0]), torch.tensor([4.0, 1.0]))
    assert shares.tolist() == [0.0, 0.0, 0.125, 0.375]


def test_an_overflow_is_said_in_plain_words(settings: GenerateSettings, tokenizer: TokenizerSettings, stage: TalkingStage) -> None:
    wild = replace(settings, limit_x0=False, images=4, temperature=1.0, guidance=40.0, diffusion_steps=20, labels=[2])
    summary = generate(tokenizer, TrainSettings(), wild, 7, stage)
    assert summary["out_of_range"] == 4
    assert stage.said[0].startswith("4 of 4 samples left the range of the data")
    assert "generate.limit_x0=true" in stage.said[0]
    assert drawn(wild.path)[1].tolist() == [2] * 4


def test_mistakes_are_named(settings: GenerateSettings, tokenizer: TokenizerSettings, stage: TalkingStage, tmp_path: Path) -> None:
    def attempt(change: dict[str, object], tokenizer: TokenizerSettings = tokenizer) -> None:
        generate(tokenizer, TrainSettings(path=str(tmp_path / "none")), replace(settings, **change), 0, stage)

    with pytest.raises(UserError, match=r"train\.path '.*none' holds no checkpoint.*generate\.checkpoint"):
        attempt({"checkpoint": ""})
    with pytest.raises(UserError, match=r"generate\.checkpoint .* is not a checkpoint: no state\.json in it"):
        attempt({"checkpoint": str(tmp_path)})
    with pytest.raises(UserError, match=r"generate\.labels has \[3\], the checkpoint's classes are 0 to 2"):
        attempt({"labels": [0, 3]})
    torch.manual_seed(5)
    other = tmp_path / "other"
    write_tokenizer(other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"tokenizer\.path .* was trained with"):
        attempt({}, TokenizerSettings(path=str(other)))
