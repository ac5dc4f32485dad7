"""Checkpoint directories: what is refused, and where the optimizer's state goes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import save_checkpoint
from released_files import TINY, weights
from safetensors.torch import load_file, save_file

from mar_model import MAR, TrainingDraws
from mar_model.checkpoints.checkpoint import load_model, load_optimizer, write_state
from mar_model.files import describe_misfit
from mar_model.training.recipe import micro_batch_draws


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = MAR(TINY)
    model.load_state_dict(weights(1))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "checkpoint", model, weights(2), {"images_seen": 64}, optimizer)
    return tmp_path / "checkpoint"


def test_weights_come_back_and_belong_to_the_model(directory: Path) -> None:
    model, state = load_model(directory)
    assert (model.config, state["images_seen"], model.training) == (TINY, 64, False)
    assert all(torch.equal(value, weights(2)[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
    with torch.no_grad():
        model.mask_token.zero_()  # nobody else's memory
    assert torch.equal(load_model(directory)[0].mask_token, weights(2)["mask_token"])


def test_a_checkpoint_of_another_geometry_is_refused(directory: Path) -> None:
    write_state(directory, replace(TINY, decoder_depth=2, classes=7), {})
    with pytest.raises(
        ValueError, match=r"ema.safetensors does not .*missing \(12\): decoder_blocks.1.*class_emb.weight is \[5, 32\], expected \[7"
    ):
        load_model(directory)
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps({**state, "model": {**state["model"], "encoder_heads": 5}}))
    with pytest.raises(ValueError, match="encoder_heads is 5, expected a divisor of encoder_width, which is 32"):
        load_model(directory)


def test_misfits_are_counted_and_the_first_named() -> None:
    expected = {f"layer.{number}": (2, 3) for number in range(8)}
    found = {"layer.0": (3, 2), "layer.1": (2, 3), "other": (1,)}
    assert describe_misfit(expected, found, shown=2) == (
        "missing (6): layer.2, layer.3, …; unexpected (1): other; mis-shaped (1): layer.0 is [3, 2], expected [2, 3]"
    )
    assert describe_misfit(expected, expected) == ""


@pytest.mark.parametrize(("options", "place"), [({}, "cpu"), ({"capturable": True}, "meta")])
def test_the_steps_of_an_optimizer_are_where_torch_keeps_them(directory: Path, options: dict, place: str) -> None:
    with torch.device("meta"):  # stands for a GPU: a device that is not the CPU
        model = MAR(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    load_optimizer(directory, model, optimizer)
    state = optimizer.state[model.mask_token]
    assert (state["step"].device.type, state["exp_avg"].device.type) == (place, "meta")

    model = MAR(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    load_optimizer(directory, model, optimizer)
    assert float(optimizer.state[model.mask_token]["step"]) == 1
    model(torch.randn(1, 2, 4, 4), torch.tensor([0]), 1, _draws())[0].total.mean().backward()
    optimizer.step()
    assert float(optimizer.state[model.mask_token]["step"]) == 2


def _draws() -> TrainingDraws:
    return micro_batch_draws(TINY, 1, 1, seed=0, images_seen=0, micro_batch=0)[0]


def test_optimizer_state_of_another_shape_is_refused(directory: Path) -> None:
    tensors = load_file(directory / "optimizer.safetensors")
    model = MAR(TINY)
    for change, message in (
        ({"exp_avg.mask_token": torch.zeros(2)}, r"exp_avg of mask_token is \[2\], expected \[1, 1, 48\]"),
        ({"exp_avg.mask_token": None}, "holds no exp_avg of parameter mask_token"),
    ):
        save_file({name: value for name, value in {**tensors, **change}.items() if value is not None}, directory / "optimizer.safetensors")
        with pytest.raises(ValueError, match=message):
            load_optimizer(directory, model, torch.optim.AdamW(model.parameters()))
