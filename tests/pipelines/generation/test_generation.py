import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from listening import Listening
from PIL import Image
from tiny_run import CLASSES, SIZE, write_checkpoint, write_tokenizer

from mar_model import MAR
from pipelines.generation import samples
from pipelines.generation.completion import read_completion
from pipelines.generation.planning import plan_drawing
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.stage import generate
from pipelines.generation.worker import LoadedModel, share_at_bounds, share_out_of_range
from pipelines.images.listing import list_images
from pipelines.images.pixels import decode
from pipelines.images.settings import ImageSettings
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.settings import TokenizerSettings

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


@pytest.fixture
def stage(ray_local: ClusterSettings) -> Listening:
    return Listening(ray_local, seed=7)


def loaded(settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Stage) -> LoadedModel:
    return LoadedModel(plan_drawing(settings.path, tokenizer.path, "", settings, stage, settings.labels))


def drawn(path: str) -> tuple[np.ndarray, np.ndarray]:
    parts = [samples.read_samples(path, *shard) for shard in samples.shards_there(path)]
    return np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])


def files(path: str) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.suffix in (".parquet", ".png")}


def test_generate_writes_shards_files_and_a_picture_and_resumes_to_the_same_bytes(
    settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening
) -> None:
    summary = generate(tokenizer.path, "", settings, stage)
    assert (summary["images"], summary["images_seen"]) == (IMAGES, 640)
    assert summary["out_of_range"] == IMAGES  # a random denoiser
    warning = stage.said.pop()
    assert warning.startswith("12 of 12 samples have more than a sixteenth of their latents at the bounds of the data's range")
    assert "train longer, or lower generate.guidance" in warning
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

    assert generate(tokenizer.path, "", settings, stage) == summary
    assert stage.said == [f"{settings.path} is complete"]

    # as if killed before the second shard was written
    for name in ("summary.json", "samples.png", "shards/samples-00000005-00000010.parquet", "images/bee/sample-00000007.png"):
        (Path(settings.path) / name).unlink()
    again = generate(tokenizer.path, "", settings, stage)
    assert files(settings.path) == whole
    assert again["tflops_per_actor"] == pytest.approx(again["gflop_per_image"] / again["seconds_per_image"] / 1000)

    with pytest.raises(UserError, match=r"seed \(found 7, expected 8\)"):
        generate(tokenizer.path, "", settings, Stage("generate", stage.cluster, seed=8))


def test_samples_depend_on_neither_batch_nor_actors(settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening) -> None:
    expected, _ = loaded(settings, tokenizer, stage).images(np.arange(IMAGES) % 3, range(IMAGES))  # one batch, in this process
    generate(tokenizer.path, "", replace(settings, batch=4, actors=2), stage)
    images, _ = drawn(settings.path)
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1
    assert np.abs(images[0].astype(int) - images[3].astype(int)).max() > 20  # same class, another sample


def test_a_resume_with_another_batch_draws_only_what_is_missing() -> None:
    assert samples.shards_to_draw(20, 8, []) == [(0, 8), (8, 16), (16, 20)]
    assert samples.shards_to_draw(20, 3, [(0, 8), (16, 20)]) == [(8, 11), (11, 14), (14, 16)]
    assert samples.shards_to_draw(20, 3, [(0, 20)]) == []


def test_shards_open_elsewhere_as_pictures(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    samples.write_samples(str(tmp_path), samples.Samples(3, np.array([3, 4]), np.array([1, 0]), images, np.zeros(2, np.float32)))
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
    held = share_at_bounds(latents.clamp(-2.0, 4.0), torch.tensor([-2.0, -2.0]), torch.tensor([4.0, 4.0]))
    assert held.tolist() == [0.0, 0.125, 0.125, 0.375]  # NaN stays NaN


def test_an_overflow_is_said_in_plain_words(settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening) -> None:
    wild = replace(settings, limit_x0=False, images=4, temperature=1.0, guidance=40.0, diffusion_steps=20, labels=[2])
    summary = generate(tokenizer.path, "", wild, stage)
    assert summary["out_of_range"] == 4
    assert stage.said[0].startswith("4 of 4 samples left the range of the data")
    assert "generate.limit_x0=true" in stage.said[0]
    assert drawn(wild.path)[1].tolist() == [2] * 4


def test_samples_are_redrawn_alone(settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening) -> None:
    expected, _ = loaded(settings, tokenizer, stage).images(np.arange(IMAGES) % 3, range(IMAGES))
    some = replace(settings, samples=[10, 4, 7], batch=2)
    assert generate(tokenizer.path, "", some, stage)["images"] == 3
    images, labels = drawn(some.path)
    assert labels.tolist() == [1, 1, 1]
    assert np.abs(images.astype(int) - expected[[10, 4, 7]].astype(int)).max() <= 1
    assert sorted(file.name for file in Path(some.path).rglob("bee/*.png")) == [f"sample-{number:08d}.png" for number in (4, 7, 10)]
    assert pq.read_table(f"{some.path}/shards/samples-00000000-00000002.parquet").column("index").to_pylist() == [10, 4]


def painted(path: Path, *, white: tuple[slice, slice] | None = None, side: int = 64) -> str:
    """An image of random colours, or a black mask with a white area."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    if white is not None:
        pixels[:] = 0
        pixels[white] = 255
    Image.fromarray(pixels).save(path)
    return str(path)


def test_an_image_is_completed_where_the_mask_is_white(
    settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening, tmp_path: Path
) -> None:
    image = painted(tmp_path / "image.png")  # twice the model's side: both are cropped alike
    mask = painted(tmp_path / "mask.png", white=(slice(0, 20), slice(0, 64)))  # a bit more than the first of four rows of tokens
    edit = replace(settings, image=image, mask=mask, images=4, labels=["bee"])
    summary = generate(tokenizer.path, "", edit, stage)
    assert (summary["images"], summary["identity"].keys() >= {"image", "mask"}) == (4, True)
    images, _ = drawn(edit.path)
    original = decode(Path(image).read_bytes(), SIZE)
    assert (images[:, 10:] == original[10:]).all()  # black in the mask: the image's own pixels, bit for bit
    assert np.abs(images[:, :10].astype(int) - original[:10]).mean() > 20
    assert np.abs(images[0, :10].astype(int) - images[1, :10]).mean() > 1  # each sample fills it in its own way
    with Image.open(f"{edit.path}/given.png") as given:
        shown = np.asarray(given)
    assert (shown[:10] == 128).all()
    assert (shown[10:] == original[10:]).all()

    decoded = replace(read_completion(image, mask, True, SIZE), keep_pixels=False)
    plan = plan_drawing(edit.path, tokenizer.path, "", edit, stage, ["bee"])
    images, _ = LoadedModel(replace(plan, completion=decoded)).images(np.ones(1, int), range(1))
    assert (images[:, 10:] != original[10:]).any()
    other = painted(tmp_path / "other.png", white=(slice(40, 64), slice(0, 9)))
    with pytest.raises(UserError, match=r"differing settings: mask \(found"):
        generate(tokenizer.path, "", replace(edit, mask=other), stage)


def test_completions_that_cannot_be_are_named_before_any_work(
    settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening, tmp_path: Path
) -> None:
    image, mask = painted(tmp_path / "image.png"), painted(tmp_path / "mask.png", white=(slice(0, 9), slice(0, 9)))
    (tmp_path / "text.png").write_text("no image")
    cases = [
        ({"image": image}, r"generate\.image is set, but generate\.mask is empty"),
        ({"image": image, "mask": str(tmp_path / "none.png")}, r"generate\.mask '.*none\.png' can't be read"),
        ({"image": str(tmp_path / "text.png"), "mask": mask}, r"generate\.image '.*text\.png' can't be used: UnidentifiedImageError"),
        (
            {"image": image, "mask": painted(tmp_path / "small.png", white=(slice(0, 9),), side=32)},
            r"mask .* is 32 × 32 pixels, .* 64 × 64",
        ),
        ({"image": image, "mask": painted(tmp_path / "black.png", white=(slice(0, 0),))}, r"generate\.mask .* hides nothing"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            generate(tokenizer.path, "", replace(settings, **change), stage)
    assert not Path(settings.path).exists()


@pytest.mark.long
def test_the_film_of_a_finished_output_shows_the_picture_as_it_forms(
    settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening
) -> None:
    filmed = replace(settings, film=True, images=6, batch=6)
    summary = generate(tokenizer.path, "", replace(filmed, film=False), stage)
    assert generate(tokenizer.path, "", filmed, stage) == summary
    with Image.open(f"{filmed.path}/film.webp") as film, Image.open(f"{filmed.path}/samples.png") as picture:
        assert film.n_frames == 1 + settings.ar_steps
        assert film.size == picture.size
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB"), int))
        final = np.asarray(picture, int)
    assert np.abs(frames[0][2:66, 2:66] - 128).max() < 16  # the first image of the grid: nothing is drawn yet (WebP is not exact)
    grey = [np.isclose(frame, 128, atol=4).all(axis=2).mean() for frame in frames]
    assert grey == sorted(grey, reverse=True)
    assert np.abs(frames[-1] - final).mean() < 12


@pytest.mark.long
def test_a_model_without_labels_is_drawn_without(
    settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening, tmp_path: Path
) -> None:
    shutil.copytree(settings.checkpoint, tmp_path / "unconditional")
    state = json.loads((tmp_path / "unconditional" / "state.json").read_text())
    state["model"]["label_drop"] = 1.0
    (tmp_path / "unconditional" / "state.json").write_text(json.dumps(state))
    blind = replace(settings, checkpoint=str(tmp_path / "unconditional"), guidance=1.0, images=2)
    model = loaded(blind, tokenizer, stage)
    one, other = (model.images(np.full(2, label), range(2))[0] for label in (0, 2))
    assert (one == other).all()
    with pytest.raises(UserError, match=r"generate\.guidance is 2\.0, but .* was trained without labels"):
        generate(tokenizer.path, "", replace(blind, guidance=2.0), stage)


@pytest.mark.long
def test_fast_modes_and_captured_loops_reach_the_sampler(
    settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(**changes: object) -> np.ndarray:
        return loaded(replace(settings, **changes), tokenizer, stage).images(np.arange(3), range(3))[0].astype(int)

    plain = images()
    assert (images(cuda_graph=True) == plain).all()  # without a GPU: the same loop on buffers of its own
    for change in (
        {"diffusion_steps_end": 2}, {"guidance_interval": [0.2, 0.6]}, {"reuse_steps": 2}, {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 1.0}, {"precision": "bf16"},
    ):  # fmt: skip
        assert (images(**change) != plain).any(), change
    assert (images(precision="bf16", cuda_graph=True) != plain).any()
    backends = []
    compile_blocks = MAR.compile_blocks
    monkeypatch.setattr(MAR, "compile_blocks", lambda model: backends.append(compile_blocks(model, backend="eager")))  # no C++ compiler
    assert np.abs(images(compile=True) - plain).max() <= 1
    assert len(backends) == 1


def test_mistakes_are_named(settings: GenerateSettings, tokenizer: TokenizerSettings, stage: Listening, tmp_path: Path) -> None:
    def attempt(change: dict[str, object], tokenizer: TokenizerSettings = tokenizer) -> None:
        generate(tokenizer.path, str(tmp_path / "none"), replace(settings, **change), stage)

    with pytest.raises(UserError, match=r"train\.path '.*none' contains no checkpoint.*generate\.checkpoint"):
        attempt({"checkpoint": ""})
    with pytest.raises(UserError, match=r"generate\.checkpoint .* is not a checkpoint: no state\.json in it"):
        attempt({"checkpoint": str(tmp_path)})
    with pytest.raises(UserError, match=r"generate\.labels contains 3, expected 0 to 2 as in the checkpoint"):
        attempt({"labels": [0, 3]})
    with pytest.raises(UserError, match=r"generate\.labels contains 'be', but the checkpoint has no such class; nearest: 'bee'"):
        attempt({"labels": ["ant", "be"]})
    torch.manual_seed(5)
    other = tmp_path / "other"
    write_tokenizer(other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"checkpoint .* was made with the tokenizer of digest"):
        attempt({}, TokenizerSettings(path=str(other)))
