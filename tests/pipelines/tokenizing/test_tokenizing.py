"""Stage *tokenize* on a real Ray: it learns, knows its finished output, and goes on where a killed run was."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from mar_model.tokenizers import KLAutoencoder, PixelTokenizer, VQAutoencoder, load_tokenizer, save_tokenizer
from mar_model.training.recipe import learning_rate
from pipelines.images.listing import Images, list_images
from pipelines.images.pairs import psnr
from pipelines.images.pixels import to_model, to_uint8
from pipelines.images.reading import DecodedImages
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import latents_digest, require_tokenizer, tokenizer_digest
from pipelines.tokenizing.job import TokenizerJob
from pipelines.tokenizing.learning.batches import batches
from pipelines.tokenizing.learning.progress import save_progress
from pipelines.tokenizing.learning.training import Training
from pipelines.tokenizing.result import RESULT, HeldOut, write_result
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.tokenizing.stage import tokenize
from pipelines.tokenizing.worker import WARMUP_SHARE


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSettings:
    """64 train and 16 held-out images, 16×16: a bright disc on a dark ground, the class being its colour."""
    source = tmp_path_factory.mktemp("discs")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :16]
    for index in range(80):
        pixels = np.full((16, 16, 3), 20, np.uint8)
        y, x = random.uniform(4, 12, 2)
        pixels[(rows - y) ** 2 + (columns - x) ** 2 < 16, index % 2] = 230
        folder = source / ("held_out" if index >= 64 else "train") / ("red", "green")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return ImageSettings(source=str(source), size=16, held_out_folder="held_out")


@pytest.fixture
def settings(tmp_path: Path) -> TokenizerSettings:
    return TokenizerSettings(
        path=str(tmp_path / "tokenizer"), channels=4, width=8, multipliers=[1, 2, 2], encoder_blocks=1, decoder_blocks=1,
        attention=False, images=3072, batch=16, learning_rate=4e-3, kl_weight=1e-3, precision="float32", checkpoint_images=1024,
    )  # fmt: skip


def test_learns_and_knows_its_finished_output(images: ImageSettings, settings: TokenizerSettings, stage: Stage) -> None:
    ctrl_c = signal.getsignal(signal.SIGINT)
    summary = tokenize(Images(images), settings, stage)
    assert signal.getsignal(signal.SIGINT) is ctrl_c  # and no handler of Ray's
    first, last = summary["loss_curve"][0], summary["loss_curve"][-1]
    assert last == [3072, summary["loss"]]
    assert last[1] < 0.2 * first[1]
    assert summary["psnr_images"] == 16
    assert sorted(storage.list_directory(settings.path)) == [
        "config.json", "identity.json", "listing.arrow", "pairs.png", "summary.json", "tokenizer.safetensors", RESULT,
    ]  # fmt: skip

    tokenizer = load_tokenizer(Path(settings.path))
    held_out, _ = DecodedImages(images, list_images(images).held_out()).take(np.arange(16))
    with torch.no_grad():
        reconstructions = to_uint8(tokenizer.decode(tokenizer.encode(to_model(held_out))[:, :4]))
    assert summary["psnr_held_out"] == pytest.approx(psnr(held_out, reconstructions).mean(), abs=0.01)
    mean_image = np.broadcast_to(held_out.mean(axis=0).round().astype(np.uint8), held_out.shape)
    assert summary["psnr_held_out"] > psnr(held_out, mean_image).mean() + 3
    with Image.open(Path(settings.path) / "pairs.png") as picture:
        assert picture.size == (8 * 96, 2 * 96)

    digest = tokenizer_digest(settings.path)
    assert tokenize(Images(images), settings, stage) == summary
    Path(settings.path, "summary.json").unlink()
    again = tokenize(Images(images), settings, stage)
    assert again["loss_curve"] == summary["loss_curve"]
    assert tokenizer_digest(settings.path) == digest
    with pytest.raises(UserError, match="learning_rate"):
        tokenize(Images(images), replace(settings, learning_rate=1e-3), stage)


@pytest.mark.long
def test_killed_and_resumed_on_two_workers_is_the_uninterrupted_run(
    images: ImageSettings, settings: TokenizerSettings, stage: Stage
) -> None:
    settings = replace(settings, images=512, workers=2)
    curve = train_here(images, settings, save_at=256)
    summary = tokenize(Images(images), settings, stage)
    np.testing.assert_allclose(summary["loss_curve"], curve, rtol=1e-3)


def train_here(images: ImageSettings, settings: TokenizerSettings, save_at: int) -> list[list[float]]:
    """The whole training in this process, step by step; leaves behind what a run killed after `save_at` images would. Returns the
    loss curve."""
    training = Training(settings, 1, torch.device("cpu"), 1)
    images_seen, curve = 0, list[list[float]]()
    for pixels, noise in batches(DecodedImages(images, list_images(images).train()), settings, (4, 4, 4), 1, 0, 0, 1):
        if images_seen == save_at:
            save_progress(settings.path, training.tensors(), images_seen, curve, [])
        rate = learning_rate(images_seen, settings.learning_rate, int(WARMUP_SHARE * settings.images), "cosine", settings.images)
        figures = training.step(pixels, noise, images_seen, rate)
        images_seen += settings.batch
        curve.append([images_seen, figures[0].item()])
    return curve


def test_the_decoder_alone_is_trained(images: ImageSettings, settings: TokenizerSettings, stage: Stage, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = VQAutoencoder(replace(settings, kind="vq", codes=32).network())
    save_tokenizer(start, tmp_path / "start")
    tuned = replace(
        settings, kind="vq", codes=32, init_from=str(tmp_path / "start"), train="decoder", images=128, ema_decay=0.9, revive_images=16,
        validation_images=64,
    )  # fmt: skip
    summary = tokenize(Images(images), tuned, stage)
    assert summary["validations"][0] == [64, pytest.approx(summary["psnr_held_out"], abs=3)]
    assert summary["identity"]["tokenizer.init_from"] == tokenizer_digest(tuned.init_from)
    found = load_tokenizer(Path(tuned.path))
    for name, value in start.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]) == name.startswith(("encoder.", "quant_conv.", "quantize.")), name
    pixels = torch.rand(2, 3, 16, 16)
    for one, other in zip(start.eval().encode(pixels), found.encode(pixels), strict=True):
        assert torch.equal(one, other)

    before = tokenizer_digest(tuned.init_from)  # as a cache and a checkpoint of before hold it
    assert latents_digest(tuned.path) == before
    assert require_tokenizer(tuned.path, before, "a cache") == tokenizer_digest(tuned.path) != before
    with torch.no_grad():
        found.quantize.embedding.weight[0] += 1  # type: ignore[union-attr]
    save_tokenizer(found, Path(tuned.path))
    with pytest.raises(UserError, match="a cache was made with the tokenizer of digest"):
        require_tokenizer(tuned.path, before, "a cache")
    with pytest.raises(
        UserError, match=r"init_from .* does not fit section tokenizer: .*; set tokenizer to its sizes: kind=vq, channels=4"
    ):
        tokenize(Images(images), replace(tuned, codes=64, path=f"{tuned.path}-other"), stage)


def test_batches_do_not_depend_on_workers(images: ImageSettings, settings: TokenizerSettings) -> None:
    rows = list_images(images).train()
    alone = list(batches(DecodedImages(images, rows), replace(settings, images=128), (4, 4, 4), 7, 32, 0, 1))
    shared = [list(batches(DecodedImages(images, rows), replace(settings, images=128), (4, 4, 4), 7, 32, one, 2)) for one in range(2)]
    assert len(alone) == 6
    for whole, left, right in zip(alone, *shared, strict=True):
        for part in range(2):
            assert torch.equal(whole[part], torch.cat([left[part], right[part]]))


def test_psnr_is_of_the_images_that_can_be_used_and_of_finite_reconstructions(settings: TokenizerSettings, tmp_path: Path) -> None:
    for part in ("train", "held_out"):
        (tmp_path / part / "a").mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (16, 16), (60 * index, 0, 0)).save(tmp_path / part / "a" / f"{index}.png")
    for index in (0, 1):
        (tmp_path / "held_out" / "a" / f"{index}.png").write_bytes(b"no image")
    images = ImageSettings(source=str(tmp_path), size=16, held_out_folder="held_out")
    listing, nobody = list_images(images), cast(Any, None)
    job = TokenizerJob(images, settings, nobody, 0, nobody, nobody)
    torch.manual_seed(0)
    tokenizer = KLAutoencoder(settings.network()).eval()
    write_result(job, tokenizer, HeldOut(job, listing), {})
    originals, _ = DecodedImages(images, list(listing.held_out())[2:]).take(np.arange(2))
    with torch.no_grad():
        reconstructions = to_uint8(tokenizer.decode(tokenizer.encode(to_model(originals))[:, :4]))
    expected = psnr(originals, reconstructions)
    assert expected[0] != pytest.approx(expected[1], abs=0.01)
    assert storage.read_json(f"{settings.path}/{RESULT}") == {"psnr_held_out": pytest.approx(expected.mean(), abs=1e-3), "psnr_images": 2}

    with torch.no_grad():  # as the last step may leave them, whose loss is of before
        next(tokenizer.parameters()).fill_(torch.nan)
    elsewhere = replace(job, tokenizer=replace(settings, path=f"{settings.path}-nan"))
    with pytest.raises(UserError, match=r"diverged \(its reconstructions are not finite after 3072 images\); lower tokenizer"):
        write_result(elsewhere, tokenizer, HeldOut(elsewhere, listing), {})
    assert not Path(elsewhere.tokenizer.path).exists()


def test_a_tokenizer_of_an_earlier_version_is_still_complete() -> None:
    before = {
        "kind", "channels", "width", "multipliers", "encoder_blocks", "decoder_blocks", "attention", "images", "batch", "learning_rate",
        "kl_weight", "precision",
    }  # fmt: skip
    assert identity_of(tokenizer=TokenizerSettings()).keys() == {f"tokenizer.{name}" for name in before}
    changed = identity_of(tokenizer=TokenizerSettings(ema_decay=0.9, workers=2))
    assert changed.keys() - {f"tokenizer.{name}" for name in before} == {"tokenizer.ema_decay"}


def test_psnr_closed_form() -> None:
    black = np.zeros((3, 4, 4, 3), np.uint8)
    other = np.stack([black[0], black[0] + 255, black[0] + 51])
    assert psnr(black, other).tolist() == pytest.approx([100.0, 0.0, 20 * np.log10(5)])


@pytest.mark.long
def test_unusable_images_are_passed_over_up_to_the_limit(images: ImageSettings, tmp_path: Path) -> None:
    for index in range(4):
        folder = tmp_path / f"class{index // 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (60 * index, 0, 0)).save(folder / f"{index}.png")
    (tmp_path / "class0" / "1.png").write_bytes(b"no image")
    broken = ImageSettings(source=str(tmp_path), size=16, max_rejected=0.25)
    rows = list_images(broken).rows
    for limit in (2**30, 0):  # kept in memory, and decoded anew each time
        source = DecodedImages(broken, rows, memory_limit=limit)
        pixels, labels = source.take(np.array([3, 1, 0]))
        assert (pixels[:, 0, 0, 0].tolist(), labels.tolist()) == ([180, 120, 0], [1, 1, 0])  # the next image, with its label
        assert list(source.rejected) == [1]
    with pytest.raises(UserError, match=r"1 of 4 images.*class0/1.png"):
        DecodedImages(replace(broken, max_rejected=0.1), rows).take(np.arange(4))


def test_pixels_need_no_training(tmp_path: Path) -> None:
    from pipelines.runtime.cluster.settings import ClusterSettings

    settings = TokenizerSettings(path=str(tmp_path / "pixels"), kind="pixels")
    tokenize(Images(ImageSettings(size=64)), settings, Stage("tokenize", ClusterSettings()))
    assert isinstance(load_tokenizer(Path(settings.path)), PixelTokenizer)
    assert json.loads(Path(settings.path, "config.json").read_text()) == {"kind": "pixels", "format_version": 1}


def test_mistakes_are_named(images: ImageSettings, settings: TokenizerSettings, stage: Stage) -> None:
    for change, message in (
        ({"multipliers": [1, 1, 1, 1, 1, 1]}, "images.size is 16, expected a multiple of the tokenizer's stride 32"),
        ({"width": 0}, "width is 0"),
        ({"batch": 15, "workers": 2}, "tokenizer.batch is 15"),
        ({"batch": 15, "workers": 5}, "tokenizer.workers 5"),
        ({"micro_batch": 3}, "tokenizer.micro_batch is 3, expected a divisor of a worker's share of the batch, 16"),
        ({"l2_weight": 0.0}, "both 0"),
        ({"train": "decoder"}, r"expected a tokenizer whose encoder is kept in tokenizer.init_from"),
        ({"perceptual_weight": 1.0}, "no file with VGG16's weights is named; set tokenizer.perceptual_weights"),
        ({"perceptual_weight": 1.0, "perceptual_weights": "/nowhere"}, "'/nowhere', which is not a file"),
        ({"kind": "vq", "learned_variance": True}, "which has no likelihood"),
        ({"init_from": "/nowhere"}, "tokenizer.init_from '/nowhere' can't be loaded"),
    ):
        with pytest.raises(UserError, match=message):
            tokenize(Images(images), replace(settings, **change), stage)
    save_tokenizer(PixelTokenizer(), Path(settings.path + "-brought"))
    with pytest.raises(UserError, match="did not make"):
        tokenize(Images(images), replace(settings, path=settings.path + "-brought"), stage)


@pytest.mark.long
def test_a_workers_user_error_reaches_the_person(images: ImageSettings, settings: TokenizerSettings, stage: Stage) -> None:
    with pytest.raises(UserError, match=r"diverged.*lower tokenizer.learning_rate"):
        tokenize(Images(images), replace(settings, learning_rate=1e30, images=64), stage)
