"""The published system's numbers: `benchmarks/parity.py` on records of the release, on parts of them, and on damaged ones."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parent.parent / "data"
TINY = {
    "gen_timestep_map", "train.tokens", "train.encoded", "train.z", "loss.mse", "loss.vb", "loss.per_token", "loss.scalar", "head.sample",
    "generate.latents",
}  # fmt: skip
SAMPLED = {"head.sample", "generate.latents"}


class Result(NamedTuple):
    status: int
    rows: dict[tuple[str, str], dict]  # by record and quantity
    complaints: list[str]


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`python -m benchmarks.parity FILES --json`, without the seconds that a new process takes."""

    def run(*files: Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["parity", *map(str, files), "--json", "--device", "cpu"])
        with pytest.raises(SystemExit) as leaving:
            runpy.run_module("benchmarks.parity", run_name="__main__")
        printed = capsys.readouterr()
        rows = [json.loads(line) for line in printed.out.splitlines() if line.startswith("{")]
        assert all(row["quantity"] in printed.out for row in rows)
        return Result(int(leaving.value.code or 0), {(row["record"], row["quantity"]): row for row in rows}, printed.err.splitlines())

    return run


def record(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(DATA / name, "pt") as stream:
        return load_file(DATA / name), stream.metadata()


def test_every_quantity_of_every_record(parity: Callable[..., Result]) -> None:
    result = parity(*sorted(DATA.glob("*.safetensors")))
    quantities = {
        "kl16_formula.safetensors": {"moments", "decoded"},
        "ldm_kl8_formula.safetensors": {"moments", "decoded"},
        "ldm_vq16_formula.safetensors": {"latent", "indices", "quantized", "quantizer_loss", "decoded"},
        "mar_base_formula.safetensors": {"train.z", "loss.per_token", "loss.scalar"},
        "mar_tiny_cfg.safetensors": TINY,
        "mar_tiny_nocfg.safetensors": TINY,
        "mar_tiny_patches.safetensors": TINY,  # patches of 2×2, a decoder wider than the encoder, more steps than tokens
    }
    assert result.rows.keys() == {(name, quantity) for name, ones in quantities.items() for quantity in ones}
    for (_, quantity), row in result.rows.items():
        assert row["error"] <= (1e-3 if quantity in SAMPLED else 1e-4), row
    assert (result.status, result.complaints) == (0, [])


PARTS = {
    "from_tokens": (["train.tokens", "train.labels", "train.mask", "train.z"], ["train.z"]),
    "mask_from_orders": (["train.latents", "train.labels", "train.orders", "train.encoded"], ["train.encoded"]),
    "decoder_alone": (["train.encoded", "train.mask", "train.z"], ["train.z"]),
    "loss_from_z": (["train.z", "train.tokens", "train.mask", "loss.t", "loss.noise", "loss.scalar"], ["loss.scalar"]),
    "loss_from_latents": (["train.latents", "train.labels", "train.mask", "loss.t", "loss.noise", "loss.vb"], ["loss.vb"]),
}


def test_parts_of_records_are_checked_from_what_is_there(parity: Callable[..., Result], tmp_path: Path) -> None:
    tensors, metadata = record("mar_tiny_cfg.safetensors")
    metadata = {name: value for name, value in metadata.items() if name != "gen_timestep_map"}
    weights = {name: value for name, value in tensors.items() if name.startswith("model.")}
    for name, (kept, _) in PARTS.items():
        save_file({**weights, **{one: tensors[one] for one in kept}}, tmp_path / name, metadata)
    head = {name: value for name, value in tensors.items() if name.startswith(("model.diffloss.", "head."))}
    save_file({**head, "train.z": tensors["train.z"]}, tmp_path / "head_alone", metadata)
    result = parity(*(tmp_path / name for name in [*PARTS, "head_alone"]))
    checked = {key for key, row in result.rows.items() if row["error"] is not None}
    assert checked == {(name, quantity) for name, (_, ones) in PARTS.items() for quantity in ones} | {("head_alone", "head.sample")}
    assert "train.mask" in result.rows["head_alone", "train.z"]["remark"] or "model." in result.rows["head_alone", "train.z"]["remark"]
    assert result.status == 0


def test_a_wrong_number_is_over_its_bound(parity: Callable[..., Result], tmp_path: Path) -> None:
    tensors, metadata = record("mar_tiny_patches.safetensors")
    outputs = sorted(TINY - {"gen_timestep_map"})
    for quantity in outputs:
        wrong = tensors[quantity].clone()
        wrong.view(-1)[-1] += 2e-3 * wrong.abs().max()
        save_file({**tensors, quantity: wrong}, tmp_path / quantity, metadata)
    save_file({**tensors, "train.z": torch.full_like(tensors["train.z"], torch.nan)}, tmp_path / "nan", metadata)
    save_file({**tensors, "loss.vb": tensors["loss.vb"][1:].clone()}, tmp_path / "shape", metadata)
    save_file(tensors, tmp_path / "steps", {**metadata, "gen_timestep_map": metadata["gen_timestep_map"].replace("999", "998")})
    for quantity in [*outputs, "nan", "shape", "steps"]:
        result = parity(tmp_path / quantity)
        failed = [name for (_, name), row in result.rows.items() if not row["passed"]]
        assert (result.status, failed) == (1, [{"nan": "train.z", "shape": "loss.vb", "steps": "gen_timestep_map"}.get(quantity, quantity)])


def test_what_is_no_record_is_said_in_a_line(parity: Callable[..., Result], tmp_path: Path) -> None:
    tensors, metadata = record("mar_tiny_cfg.safetensors")
    files = {
        "absent": None,
        "text": b"no record",
        "cut_off": (DATA / "mar_tiny_cfg.safetensors").read_bytes()[:100_000],
        "no_weights": ({"train.z": tensors["train.z"]}, metadata),
        "nothing_to_check": ({name: value for name, value in tensors.items() if name.startswith("model.")}, {"patch_size": "1"}),
        "other_sizes": (tensors, {**metadata, "patch_size": "3"}),
        "stray_weight": ({**tensors, "model.stray": tensors["head.z"].clone()}, metadata),
    }
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            save_file(content[0], tmp_path / name, content[1])
    result = parity(*(tmp_path / name for name in files))
    assert result.status == 2
    assert [name for name, line in zip(files, result.complaints, strict=True) if str(tmp_path / name) not in line] == []
    assert result.rows == {}
    assert "stray" in result.complaints[-1]


def test_a_wrong_code_is_over_its_bound(parity: Callable[..., Result], tmp_path: Path) -> None:
    tensors, metadata = record("ldm_vq16_formula.safetensors")
    kept = {name: tensors[name] for name in ("latent", "indices", "quantized", "model.quantize.embedding.weight")}
    kept["indices"] = kept["indices"].clone()
    kept["indices"][0, 1, 1] += 1
    save_file(kept, tmp_path / "one", metadata)
    save_file(kept, tmp_path / "unknown", {**metadata, "model": "ldm_vq4"})
    result = parity(tmp_path / "one")
    assert (result.status, [name for (_, name), row in result.rows.items() if not row["passed"]]) == (1, ["indices"])
    result = parity(tmp_path / "unknown")
    assert (result.status, result.rows) == (2, {})
    assert "model is 'ldm_vq4', expected one of ldm_vq16, ldm_kl16, ldm_kl8" in result.complaints[0]
