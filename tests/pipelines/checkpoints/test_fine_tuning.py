"""What a run keeps of the checkpoint it begins with: by shape, and classes by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import save_checkpoint
from tiny_cache import ARCHITECTURE

from mar_model.config import MARConfig
from mar_model.mar import MAR
from pipelines.checkpoints.directory import checkpoint_path
from pipelines.checkpoints.fine_tuning import CLASSES, start_from
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.training.settings import TrainSettings
from pipelines.training.stage import begun_with

CONFIG = MARConfig(**vars(ARCHITECTURE), latent_size=4, latent_channels=4, classes=3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """A checkpoint of classes ant, bee, cat, and its averaged weights."""
    torch.manual_seed(0)
    model = MAR(CONFIG)
    average = {name: value.detach() + 1 for name, value in model.named_parameters()}
    save_checkpoint(tmp_path / "checkpoint", model, average, {"images_seen": 9, "class_names": ["ant", "bee", "cat"]})
    return str(tmp_path / "checkpoint"), average


def test_all_is_kept_where_the_classes_are_the_same(checkpoint: tuple[str, dict[str, torch.Tensor]]) -> None:
    path, average = checkpoint
    start = start_from(path, CONFIG, ["ant", "bee", "cat"])
    weights = start.weights(MAR(CONFIG))
    assert all(torch.equal(weights[name], average[name]) for name in average)
    assert start.initialized == ()


def test_classes_are_found_by_name_and_others_start_anew(checkpoint: tuple[str, dict[str, torch.Tensor]]) -> None:
    path, average = checkpoint
    names = ["cat", "dog", "ant", "eel", "fox"]
    config = replace(CONFIG, classes=5)
    start = start_from(path, config, names)
    torch.manual_seed(1)
    model = MAR(config)
    weights = start.weights(model)
    assert torch.equal(weights[CLASSES][[0, 2]], average[CLASSES][[2, 0]])
    assert torch.equal(weights[CLASSES][[1, 3, 4]], model.class_emb.weight[[1, 3, 4]])
    assert all(torch.equal(weights[name], average[name]) for name in average if name != CLASSES)
    assert start.describe(names)[1] == "classes: 2 found in the checkpoint by name: cat, ant; 3 initialized"
    reordered = start_from(path, CONFIG, ["bee", "ant", "cat"]).weights(MAR(CONFIG))  # as many classes, but in another order
    assert torch.equal(reordered[CLASSES], average[CLASSES][[1, 0, 2]])


def test_what_has_another_shape_starts_anew_and_is_named(checkpoint: tuple[str, dict[str, torch.Tensor]]) -> None:
    path = checkpoint[0]
    config = replace(CONFIG, latent_size=8)
    start = start_from(path, config, ["ant", "bee", "cat"])
    assert set(start.initialized) == {"encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"}
    assert "encoder_pos_embed_learned" in "\n".join(start.describe(["ant", "bee", "cat"]))
    with pytest.raises(UserError, match="found 1 encoder blocks of width 32, expected 1 encoder blocks of width 64"):
        start_from(path, replace(CONFIG, encoder_width=64, decoder_width=64), ["ant"])
    (Path(path) / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.init_from: .*ema\.safetensors is damaged"):
        start_from(path, CONFIG, ["ant"])


def test_a_run_with_checkpoints_of_its_own_goes_on_when_what_it_began_with_is_gone(tmp_path: Path) -> None:
    settings = TrainSettings(path=str(tmp_path / "train"), init_from=str(tmp_path / "dropped"))
    storage.write_json(f"{settings.path}/identity.json", {"train.init_from": "0" * 64})
    with pytest.raises(UserError, match="dropped"):  # nothing to go on from
        begun_with(settings, CONFIG, ["ant"])
    model = MAR(CONFIG)
    state = {
        "images_seen": 16, "step": 2, "intervals": [], "interval": [], "image_size": 8, "latent_mean": [0.0], "latent_std": [1.0],
        "latent_min": [-1.0], "latent_max": [1.0], "tokenizer": {"path": "tokenizer", "digest": "0" * 64},
    }  # fmt: skip
    save_checkpoint(Path(checkpoint_path(settings.path, 16)), model, dict(model.state_dict()), state)
    assert begun_with(settings, CONFIG, ["ant"]) == (None, {"train.init_from": "0" * 64})
