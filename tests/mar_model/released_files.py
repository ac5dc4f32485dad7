"""Files as the public release writes them: with random weights, small; and with the published names and shapes, without weights."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar_model import MAR, MARConfig

DATA = Path(__file__).parent.parent / "data"
PUBLISHED: dict[str, Any] = json.loads((DATA / "published_state_dicts.json").read_text())
TINY = MARConfig(
    encoder_depth=2, encoder_width=32, encoder_heads=2, decoder_depth=1, decoder_width=48, decoder_heads=3, mlp_ratio=2.7, buffer_size=3,
    denoiser_depth=2, denoiser_width=40, latent_size=4, latent_channels=2, patch_size=2, classes=5, label_drop=0.2, diffusion_repeats=1,
)  # fmt: skip
ARGUMENTS = argparse.Namespace(
    model="mine", img_size=32, vae_stride=8, vae_embed_dim=2, patch_size=2, encoder_num_heads=2, decoder_num_heads=3, mlp_ratio=2.7,
    label_drop_prob=0.2, diffusion_batch_mul=1, data_path="./data/imagenet", lr=None, evaluate=False,
)  # fmt: skip


def weights(seed: int, config: MARConfig = TINY) -> dict[str, Tensor]:
    """A MAR state dict, every value random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        names = MAR(config).state_dict()
    return {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in names.items()}


def write_released(path: Path, **changes: Any) -> Path:
    """A `checkpoint-last.pth` with all that the release keeps in it; `changes` replace entries, None removes one."""
    raw = weights(1)
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    content = {
        "model": raw,
        "model_ema": weights(2),
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}]},
        "epoch": 399,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": ARGUMENTS,
    }
    torch.save({name: value for name, value in {**content, **changes}.items() if value is not None}, path)
    return path


def without_values(name: str) -> dict[str, Tensor]:
    """A published state dict: every name and shape, one zero behind all of a tensor's values."""
    return {key: torch.zeros(1).expand(shape) for key, shape in PUBLISHED[name]["state_dict"].items()}
