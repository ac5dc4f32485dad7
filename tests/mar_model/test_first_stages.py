"""Files of LDM's first stages: sizes from names and shapes, Lightning checkpoints, and what is refused."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mar_model.checkpoints.first_stages import import_tokenizer, released_network_config
from mar_model.files import describe_misfit, shapes_of
from mar_model.tokenizers import KLConfig, NetworkConfig, VQAutoencoder, VQConfig, load_tokenizer, without_weights

PUBLISHED = json.loads((Path(__file__).parent.parent / "data" / "published_first_stages.json").read_text())
CONFIGS = {
    "ldm_vq16": VQConfig(level_attention="both"),
    "ldm_kl16": KLConfig(level_attention="both"),
    "ldm_kl8": KLConfig(channels=4, multipliers=(1, 2, 4, 4), level_attention="none"),
}
LOSS = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7)}
TINY = VQConfig(channels=4, width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, level_attention="both", codes=20)


def lightning(path: Path, weights: dict[str, Tensor], **others: Any) -> Path:
    """A checkpoint as Lightning 1 writes it: the states of callbacks stand under their classes."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    packages = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks")} | {module.__name__: module}
    sys.modules.update(packages)
    content = {
        "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2", "state_dict": {**weights, **LOSS},
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "best_model_path": "x"}}, "optimizer_states": [],
    }  # fmt: skip
    torch.save({**content, **others}, path)
    for name in packages:
        del sys.modules[name]
    return path


def random_weights(config: NetworkConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) for name, value in without_weights(config).state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_names_and_shapes(name: str, tmp_path: Path) -> None:
    shapes = {key: tuple(shape) for key, shape in PUBLISHED[name]["state_dict"].items()}
    assert released_network_config(shapes) == CONFIGS[name]
    tokenizer = without_weights(CONFIGS[name])
    assert describe_misfit(shapes_of(tokenizer.state_dict()), shapes) == ""
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == PUBLISHED[name]["parameters"]
    weights = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}  # one zero behind all values
    odd = "decoder.up.1.block.2.conv1.weight"
    del weights["encoder.norm_out.bias"]
    with pytest.raises(ValueError, match=rf"missing \(1\): encoder.norm_out.bias; mis-shaped \(1\): {odd} is \[1, 2\], expected"):
        import_tokenizer(lightning(tmp_path / "file.ckpt", {**weights, odd: torch.zeros(1, 2)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [TINY, KLConfig(channels=3, width=8, multipliers=(1, 2), level_attention="both")])
def test_every_bit_is_imported(config: KLConfig | VQConfig, tmp_path: Path) -> None:
    weights = random_weights(config)
    assert import_tokenizer(lightning(tmp_path / "file.ckpt", weights), tmp_path / "out") == config
    found = load_tokenizer(tmp_path / "out").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_one_tensor_of_a_wrong_shape_is_not_another_network(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    for name in ("post_quant_conv.weight", "encoder.conv_in.weight", "quantize.embedding.weight", "encoder.down.1.block.0.conv1.weight"):
        for wrong in (torch.zeros(5), torch.zeros(()), torch.zeros(7, 3, 1, 1)):
            path = lightning(tmp_path / "file.ckpt", {**weights, name: wrong})
            with pytest.raises(ValueError, match=rf"mis-shaped \(1\): {name} is "):
                import_tokenizer(path, tmp_path / "out")


def test_foreign_and_hostile_files_are_refused(tmp_path: Path) -> None:
    weights, mark = random_weights(TINY), tmp_path / "mark"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(mark),)

    cases = {
        "hostile": ({"callbacks": Hostile()}, weights, "mkdir"),
        "levels": ({}, {f"encoder.down.{level}.block.0.conv1.weight": torch.zeros(1) for level in range(100)}, "100 levels"),
        "not finite": ({}, {**weights, "quant_conv.bias": torch.full((4,), torch.nan)}, "not finite in 1 tensors: quant_conv.bias"),
        "another model": ({}, {"model.diffusion_model.x": torch.zeros(1)}, "or a Lightning checkpoint of an autoencoder"),
        "not tensors": ({}, {**weights, "encoder.x": "text"}, "contains no weights under 'model' but encoder.x"),
        "stray": ({}, {**weights, "model_ema.decay": torch.zeros(())}, r"unexpected \(1\): model_ema.decay"),
    }
    for name, (others, content, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            import_tokenizer(lightning(tmp_path / name, content, **others), tmp_path / "out")
    whole = (lightning(tmp_path / "whole", weights)).read_bytes()
    (tmp_path / "cut off").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut off is not a PyTorch file, or is truncated or damaged"):
        import_tokenizer(tmp_path / "cut off", tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_memory_is_one_copy_of_the_weights(tmp_path: Path) -> None:
    config = VQConfig(**{**vars(TINY), "codes": 8_000_000})  # 128 MB
    lightning(tmp_path / "file.ckpt", random_weights(config))
    program = (
        "import resource, sys; from pathlib import Path; from mar_model.checkpoints.first_stages import import_tokenizer\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); import_tokenizer(Path(sys.argv[1]), Path(sys.argv[2])); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file.ckpt"), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.5 * 8_000_000 * 16 / 2**20
    assert isinstance(load_tokenizer(tmp_path / "out"), VQAutoencoder)
