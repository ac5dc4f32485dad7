"""Checkpoints of the public release: sizes from shapes, import and export, and files that are not what they should be."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_files import ARGUMENTS, PUBLISHED, TINY, weights, without_values, write_released
from safetensors.torch import load_file, save_file

from mar_model import MAR, MARConfig
from mar_model.checkpoints.checkpoint import load_model, read_state
from mar_model.checkpoints.first_stages import import_tokenizer, released_network_config
from mar_model.checkpoints.released import checked_config, export_checkpoint, import_checkpoint
from mar_model.checkpoints.released_file import ReleasedFile
from mar_model.checkpoints.released_sizes import released_config
from mar_model.files import shapes_of
from mar_model.tokenizers import KLAutoencoder, KLConfig, load_tokenizer

SIZES = {  # depth, width, heads; depth and width of the denoiser
    "mar_base": (12, 768, 12, 6, 1024),
    "mar_large": (16, 1024, 16, 8, 1280),
    "mar_huge": (20, 1280, 16, 12, 1536),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_read_from_names_and_shapes(name: str, tmp_path: Path) -> None:
    torch.save({"model": without_values(name), "model_ema": without_values(name), "epoch": 799}, tmp_path / "checkpoint-last.pth")
    file = ReleasedFile(tmp_path / "checkpoint-last.pth")
    depth, width, heads, denoiser_depth, denoiser_width = SIZES[name]
    expected = MARConfig(
        encoder_depth=depth, encoder_width=width, encoder_heads=heads, decoder_depth=depth, decoder_width=width, decoder_heads=heads,
        denoiser_depth=denoiser_depth, denoiser_width=denoiser_width,
    )  # fmt: skip
    assert checked_config(file) == expected
    assert not file.is_tokenizer
    with torch.device("meta"):
        model = MAR(expected)
    assert shapes_of(model.state_dict()) == {key: tuple(shape) for key, shape in PUBLISHED[name]["state_dict"].items()}
    assert sum(one.numel() for one in model.parameters()) == PUBLISHED[name]["params"]
    assert released_config({}, {"model": name, "diffloss_d": str(denoiser_depth), "diffloss_w": denoiser_width}) == expected


def test_published_tokenizer(tmp_path: Path) -> None:
    torch.save({"model": without_values("kl16")}, tmp_path / "kl16.ckpt")
    file = ReleasedFile(tmp_path / "kl16.ckpt")
    assert file.is_tokenizer
    assert released_network_config(shapes_of(file.weights["model"])) == KLConfig()


def test_512_pixels_and_pixel_space_have_their_sizes() -> None:
    shapes = {**{name: tuple(shape) for name, shape in PUBLISHED["mar_large"]["state_dict"].items()}}
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned"):
        shapes[name] = (1, 64 + 1024, 1024)
    shapes["diffusion_pos_embed_learned"] = (1, 1024, 1024)
    config = released_config(shapes, {"img_size": 512})
    assert (config.latent_size, config.tokens, config.token_dim) == (32, 1024, 16)
    with torch.device("meta"):
        moments = KLAutoencoder(KLConfig()).encode(torch.empty(1, 3, 512, 512))
    assert moments.shape == (1, 32, 32, 32)
    pixels = MARConfig(latent_size=64, latent_channels=3, patch_size=4)
    assert (pixels.tokens, pixels.token_dim) == (256, 48)
    shapes |= {"z_proj.weight": (1024, 48), "diffloss.net.input_proj.weight": (1280, 48), "diffusion_pos_embed_learned": (1, 256, 1024)}
    shapes |= {f"{half}_pos_embed_learned": (1, 320, 1024) for half in ("encoder", "decoder")}
    assert released_config(shapes, {}, patch_size=4).latent_channels == 3
    with pytest.raises(ValueError, match="tokens have 48 values"):
        released_config(shapes, {})


@pytest.mark.parametrize("positions", [255, 17, 320, 400])
def test_a_wrong_number_of_tokens_is_not_taken_for_another_model(positions: int) -> None:
    shapes = shapes_of(without_values("mar_base"))
    config = released_config({**shapes, "diffusion_pos_embed_learned": (1, positions, 768)}, {})
    assert config == released_config(shapes, {})


def test_what_shapes_do_not_tell() -> None:
    shapes = shapes_of(weights(0))
    told = vars(ARGUMENTS)
    assert released_config(shapes, told) == TINY
    chosen = {"encoder_heads": 4, "decoder_heads": 6, "latent_channels": 8, "patch_size": 1}
    assert released_config(shapes, {}, **chosen) == replace(
        TINY, **chosen, latent_size=2, mlp_ratio=released_config(shapes, {}, **chosen).mlp_ratio, label_drop=0.1, diffusion_repeats=4
    )
    with pytest.raises(ValueError, match="unknown for encoder width 32: give the heads"):
        released_config(shapes, {})
    with pytest.raises(ValueError, match="8 values, but 16 latent channels"):
        released_config(shapes, {}, encoder_heads=4, decoder_heads=6)
    with pytest.raises(ValueError, match="patch_size is 'two', expected a whole number"):
        released_config(shapes, {"patch_size": "two"})


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return write_released(tmp_path / "checkpoint-last.pth")


def test_import_and_export_give_back_every_bit(released: Path, tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    assert import_checkpoint(released, imported, {"class_names": []}) == TINY
    for ema, seed in ((True, 2), (False, 1)):
        model, state = load_model(imported, ema=ema)
        assert not model.training
        assert all(torch.equal(value, weights(seed)[name]) for name, value in model.state_dict().items())
    assert (state["epochs"], state["images_seen"], state["image_size"]) == (400, None, 32)
    assert (state["latent_mean"], state["latent_std"]) == ([0.0, 0.0], [1 / 0.2325] * 2)
    assert (state["latent_min"], state["latent_max"]) == (None, None)

    export_checkpoint(imported, tmp_path / "again.pth")
    content = torch.load(tmp_path / "again.pth", weights_only=True)
    assert content.keys() == {"model", "model_ema"}
    for key, seed in (("model", 1), ("model_ema", 2)):
        assert content[key].keys() == weights(seed).keys()
        assert all(torch.equal(value, weights(seed)[name]) for name, value in content[key].items())
    heads = {"encoder_heads": 2, "decoder_heads": 3, "patch_size": 2, "stride": 8}
    import_checkpoint(tmp_path / "again.pth", tmp_path / "imported again", {}, **heads)
    files = read_state(tmp_path / "imported again")["files"]
    assert files == state["files"]


def test_raw_weights_and_files_with_one_set(released: Path, tmp_path: Path) -> None:
    import_checkpoint(released, tmp_path / "raw", {}, ema=False)
    for ema in (True, False):
        assert torch.equal(load_model(tmp_path / "raw", ema)[0].mask_token, weights(1)["mask_token"])
    import_checkpoint(write_released(released, model=None), tmp_path / "ema", {})
    for ema in (True, False):
        assert torch.equal(load_model(tmp_path / "ema", ema)[0].mask_token, weights(2)["mask_token"])
    with pytest.raises(ValueError, match="has no 'model', only 'model_ema': use --ema"):
        import_checkpoint(released, tmp_path / "none", {}, ema=False)
    with pytest.raises(ValueError, match="use --raw"):
        import_checkpoint(write_released(released, model_ema=None), tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


def test_half_precision_and_the_old_file_format(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in weights(1).items()}
    torch.save({"model": half, "model_ema": half, "args": ARGUMENTS}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    import_checkpoint(tmp_path / "old.pth", tmp_path / "imported", {})
    model, _ = load_model(tmp_path / "imported")
    assert all(torch.equal(value, half[name].float()) for name, value in model.state_dict().items())


def test_a_tokenizer_is_imported(tmp_path: Path) -> None:
    config = KLConfig(channels=4, width=12, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=2, attention=False, level_attention="none")
    tokenizer = KLAutoencoder(config).eval()
    torch.save({"model": tokenizer.state_dict()}, tmp_path / "kl.ckpt")
    assert import_tokenizer(tmp_path / "kl.ckpt", tmp_path / "tokenizer") == config
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_tokenizer(tmp_path / "tokenizer").encode(images), tokenizer.encode(images))
    broken = {name: value for name, value in tokenizer.state_dict().items() if name != "quant_conv.bias"}
    torch.save({"model": {**broken, "loss.logvar": torch.zeros(1)}}, tmp_path / "kl.ckpt")
    with pytest.raises(ValueError, match=r"missing \(1\): quant_conv.bias; unexpected \(1\): loss.logvar"):
        import_tokenizer(tmp_path / "kl.ckpt", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _half(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in found.items() if not name.startswith("encoder_blocks.0.")}
    return {**found, "head.weight": torch.zeros(3), "mask_token": torch.zeros(1, 2, 48)}


def _with(name: str, *shape: int) -> Callable:
    return lambda found: {**found, name: torch.zeros(*shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_half, r"missing \(12\): encoder_blocks.0.attn.*, …; unexpected \(1\): head.weight; mis-shaped \(1\)"),
        (lambda found: {**found, "encoder_blocks.100000000.x": torch.zeros(1)}, r"unexpected \(1\): encoder_blocks.100000000.x"),
        (_with("mask_token", 1, 1, 50), r"mis-shaped \(1\): mask_token is \[1, 1, 50\], expected \[1, 1, 48\]$"),
        (_with("z_proj.weight", 33, 7), r"mis-shaped \(1\): z_proj.weight is \[33, 7\], expected \[32, 8\]$"),
        (_with("encoder_norm.weight", 31), r"mis-shaped \(1\): encoder_norm.weight is \[31\], expected \[32\]$"),
        (_with("encoder_pos_embed_learned", 1, 9, 32), r"mis-shaped \(1\): decoder_pos_embed_learned is \[1, 7, 48\], expected \[1, 9"),
        (lambda found: {"conv1.weight": torch.zeros(3, 3)}, r"missing \(\d{3}\): .*unexpected \(1\): conv1.weight"),
        (lambda found: {**found, "mask_token": torch.full((1, 1, 48), torch.nan)}, "not finite in 1 tensors: mask_token"),
        (lambda found: {**found, "mask_token": torch.ones(1, 1, 48).long()}, "mask_token is torch.int64"),
        (lambda found: {**found, "mask_token": torch.ones(1, 1, 48, device="meta")}, "mask_token is torch.float32, torch.strided, on meta"),
        (lambda found: {**found, "mask_token": [1.0]}, "contains no weights under 'model_ema' but mask_token"),
        (lambda found: {}, "contains no weights under 'model_ema' but nothing"),
        (lambda found: torch.zeros(3), "contains no weights under 'model_ema' but model_ema"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(change: Callable, message: str, tmp_path: Path) -> None:
    path = write_released(tmp_path / "checkpoint-last.pth", model_ema=change(weights(2)))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(path, tmp_path / "imported", {})
    assert not (tmp_path / "imported").exists()


class Exploit:
    """Unpickled by `pickle`, it writes a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return (os.system, (self.command,))


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    exploit = Exploit(f"touch {tmp_path}/owned")
    pickle.loads(pickle.dumps(exploit))  # it does work
    (tmp_path / "owned").unlink()
    for name, options in {"new": {}, "old": {"_use_new_zipfile_serialization": False}}.items():
        torch.save({"model": weights(1), "model_ema": weights(2), "args": exploit}, tmp_path / name, **options)
        with pytest.raises(ValueError, match=r"contains (posix|os)\.system; only tensors"):
            ReleasedFile(tmp_path / name)
    (tmp_path / "pickle").write_bytes(pickle.dumps(exploit, protocol=2))
    with pytest.raises(ValueError, match="pickle"):
        ReleasedFile(tmp_path / "pickle")
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_checkpoints(released: Path, tmp_path: Path) -> None:
    whole = released.read_bytes()
    save_file(weights(1), tmp_path / "safetensors")
    contents = {"text": b"no checkpoint", "empty": b"", "first half": whole[: len(whole) // 2], "no end": whole[:-30]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a PyTorch file, or is truncated or damaged"):
            ReleasedFile(tmp_path / name)
    torch.save({"state_dict": weights(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds \['state_dict'\], expected a dictionary with weights under 'model' or 'model_ema', or"):
        ReleasedFile(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="absent is not a file"):
        ReleasedFile(tmp_path / "absent")


def test_memory_is_one_copy_of_the_weights(tmp_path: Path) -> None:
    sets = {key: {**weights(1), "class_emb.weight": torch.full((1_000_000, 32), 0.5)} for key in ("model", "model_ema")}  # 128 MB each
    write_released(tmp_path / "checkpoint-last.pth", **sets)
    program = (
        "import resource, sys; from pathlib import Path; from mar_model.checkpoints.released import import_checkpoint\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), {}); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "checkpoint-last.pth"), str(tmp_path / "imported")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    copy = sum(value.numel() for value in load_file(tmp_path / "imported" / "ema.safetensors").values()) * 4 / 2**20
    assert float(done.stdout) < 1.5 * copy  # and not the two that are in the file
    assert json.loads((tmp_path / "imported" / "state.json").read_text())["model"]["classes"] == 1_000_000
