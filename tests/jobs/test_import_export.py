"""`mar import` and `mar export`, and images drawn from what was imported."""

import json
from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Mar

from jobs.config.load import load
from mar_model import MAR, GenerationOptions, MARConfig, SampleNoise, generate
from mar_model.checkpoints.checkpoint import load_model
from mar_model.checkpoints.released_sizes import released_config
from mar_model.config import Architecture
from mar_model.tokenizers import KLAutoencoder, KLConfig
from pipelines.generation.planning import plan_drawing
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.worker import LoadedModel
from pipelines.images.pixels import to_uint8
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage

SHAPES = Path(__file__).parent.parent / "data" / "published_state_dicts.json"
MODEL = MARConfig(
    encoder_depth=1, encoder_width=64, encoder_heads=1, decoder_depth=1, decoder_width=128, decoder_heads=2, buffer_size=2,
    denoiser_depth=1, denoiser_width=24, latent_size=4, latent_channels=4, patch_size=2, classes=3,
)  # fmt: skip
TOKENIZER = KLConfig(channels=4, width=8, multipliers=(1, 2, 2), encoder_blocks=1, decoder_blocks=1)


def random_weights(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in model.state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `checkpoint-last.pth` and `kl16.ckpt`, both tiny."""
    folder = tmp_path / "release"
    folder.mkdir()
    weights = {"model": random_weights(MAR(MODEL), 1), "model_ema": random_weights(MAR(MODEL), 2)}
    torch.save(weights, folder / "checkpoint-last.pth")
    torch.save({"model": random_weights(KLAutoencoder(TOKENIZER), 3)}, folder / "kl16.ckpt")
    return folder


def drawn(checkpoint: str, tokenizer: str, **settings: object) -> np.ndarray:
    """Two samples, of labels 0 and 2."""
    wanted = GenerateSettings(
        checkpoint=checkpoint, images=2, labels=[0, 2], ar_steps=2, diffusion_steps=3, guidance=2.0, precision="float32", **settings
    )  # type: ignore[arg-type]
    drawing = plan_drawing("unused", tokenizer, "", wanted, Stage("generate", load().cluster, seed=5), [0, 2])
    return LoadedModel(drawing).images(np.array([0, 2]), range(2))[0]


def test_images_of_an_imported_checkpoint_and_back(mar: Mar, folder: Path, tmp_path: Path) -> None:
    tokenizer, checkpoint = str(tmp_path / "tokenizer"), str(tmp_path / "runs" / "checkpoint")
    result = mar("import", str(folder / "kl16.ckpt"), "--out", tokenizer)
    assert (result.status, "latent channels: 4" in result.out, "stride: 4" in result.out) == (0, True, True), result.err
    result = mar("import", str(folder), "--out", checkpoint, "--tokenizer", tokenizer)
    assert (result.status, "decoder heads: 2" in result.out, "patch size: 2" in result.out) == (0, True, True), result.err
    result = mar("import", str(folder), "--out", checkpoint, "--tokenizer", tokenizer)
    assert (result.status, f"complete: {checkpoint}" in result.out) == (0, True)

    model, autoencoder = MAR(MODEL).eval(), KLAutoencoder(TOKENIZER).eval()
    autoencoder.load_state_dict(random_weights(autoencoder, 3))
    for ema, seed in ((True, 2), (False, 1)):
        model.load_state_dict(random_weights(model, seed))
        latents = generate(
            model, torch.tensor([0, 2]), SampleNoise(5, [0, 1]), GenerationOptions(ar_steps=2, diffusion_steps=3, guidance=2.0)
        )
        with torch.no_grad():
            expected = to_uint8(autoencoder.decode(latents / 0.2325))
        assert np.abs(drawn(checkpoint, tokenizer, ema=ema).astype(int) - expected).max() <= 1

    result = mar("export", checkpoint, "--format", "released", "--out", str(tmp_path / "resume"))
    assert result.status == 0
    for file in (tmp_path / "resume" / "checkpoint-last.pth", folder / "checkpoint-last.pth"):
        content = torch.load(file, weights_only=True)
        assert content.keys() == {"model", "model_ema"}
        assert all(torch.equal(value, random_weights(model, 2)[name]) for name, value in content["model_ema"].items())
        assert all(torch.equal(value, random_weights(model, 1)[name]) for name, value in content["model"].items())
    assert mar("export", checkpoint, "--out", str(tmp_path / "resume")).status == 2  # there already

    state = Path(checkpoint) / "state.json"  # of a model trained here: its latents have a scale for each channel
    state.write_text(json.dumps({**json.loads(state.read_text()), "latent_std": [1.0, 2.0, 3.0, 4.0]}))
    other = mar("export", checkpoint, "--out", str(tmp_path / "other"))
    assert (other.status, "another scale" in other.out, "another scale" in result.out) == (0, True, False), other.err


def test_a_released_file_is_taken_where_a_checkpoint_is(mar: Mar, folder: Path, tmp_path: Path) -> None:
    tokenizer, other = str(tmp_path / "tokenizer"), tmp_path / "other"
    assert mar("import", str(folder / "kl16.ckpt"), "--out", tokenizer).status == 0
    torch.save({**torch.load(folder / "checkpoint-last.pth"), "args": _arguments()}, folder / "mine.pth")
    images = drawn(str(folder / "mine.pth"), tokenizer)
    imported = folder / "mine.pth.imported"
    before = (imported / "state.json").stat().st_mtime_ns
    assert np.array_equal(drawn(str(folder / "mine.pth"), tokenizer), images)
    assert (imported / "state.json").stat().st_mtime_ns == before  # imported once
    torch.save({**torch.load(folder / "mine.pth", weights_only=False), "model_ema": random_weights(MAR(MODEL), 4)}, folder / "mine.pth")
    assert not np.array_equal(drawn(str(folder / "mine.pth"), tokenizer), images)  # and anew when the file is another
    assert torch.equal(load_model(imported)[0].mask_token, random_weights(MAR(MODEL), 4)["mask_token"])

    torch.save({"model": random_weights(KLAutoencoder(KLConfig(channels=5, width=8, multipliers=(1, 1))), 0)}, tmp_path / "kl.ckpt")
    assert mar("import", str(tmp_path / "kl.ckpt"), "--out", str(other)).status == 0
    with pytest.raises(UserError, match="has 5 latent channels, expected 4 as in the checkpoint's model"):
        drawn(str(imported), str(other))
    result = mar("import", str(folder / "mine.pth"), "--out", str(tmp_path / "no"), "--tokenizer", str(other))
    assert (result.status, "give the patch size and the tokenizer" in result.err) == (2, True)
    assert not (tmp_path / "no").exists()


def _arguments() -> Namespace:
    return Namespace(patch_size=2, vae_embed_dim=4, vae_stride=4, img_size=16)


def test_raw_weights_and_options(mar: Mar, folder: Path, tmp_path: Path) -> None:
    options = ("--raw", "--heads", "2,4", "--patch-size", "1", "--stride", "8", "--latent-scale", "0.5")
    assert mar("import", str(folder), "--out", str(tmp_path / "raw"), *options).status == 0
    for ema in (True, False):
        model, state = load_model(tmp_path / "raw", ema)
        assert torch.equal(model.mask_token, random_weights(model, 1)["mask_token"])
    assert (model.config.encoder_heads, model.config.decoder_heads, model.config.latent_channels) == (2, 4, 16)
    assert (state["image_size"], state["latent_std"]) == (16, [2.0] * 16)
    assert state["tokenizer"] == {"path": "", "digest": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.pth",), "absent.pth does not exist"),
        (("text.pth",), "text.pth is not a PyTorch file, or is truncated or damaged"),
        (("half.pth",), "missing (4): decoder_blocks.0.attn.proj.bias, "),
        (("release", "--heads", "many"), "--heads is 'many', expected one whole number above 0, or two, e.g. 12,16"),
        (("release", "--heads", "5"), "encoder_heads is 5, expected a divisor of encoder_width, which is 64"),
        (("release", "--patch-size", "3"), "tokens have 16 values"),
        (("release", "--latent-scale", "0"), "--latent-scale is 0.0, expected a number above 0"),
        (("release", "--tokenizer", "release"), "is not a tokenizer directory"),
        (("release/kl16.ckpt", "--raw"), "contains a tokenizer; leave out --raw and the size options, which are for MAR checkpoints"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    mar: Mar, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = torch.load(folder / "checkpoint-last.pth")
    content["model_ema"] = {name: value for name, value in content["model_ema"].items() if ".attn." not in name or "encoder" in name}
    torch.save(content, "half.pth")
    Path("text.pth").write_text("no checkpoint")
    result = mar("import", *arguments, "--out", "out/here")
    assert (result.status, message in result.err) == (2, True), result.err
    assert not Path("out/here").exists()
    assert not list(Path("out").glob("**/*")) if Path("out").exists() else True


def test_what_is_there_is_not_overwritten(mar: Mar, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    result = mar("import", str(folder), "--out", str(tmp_path / "mine"), "--patch-size", "2")
    assert (result.status, "exists, but was not imported from this checkpoint-last.pth" in result.err) == (2, True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge"])
def test_presets_are_the_published_sizes(name: str) -> None:
    shapes = {key: tuple(shape) for key, shape in json.loads(SHAPES.read_text())[name]["state_dict"].items()}
    published = asdict(released_config(shapes, {}))
    assert {one.name: published[one.name] for one in fields(Architecture)} == asdict(load(name).model)
