"""Runs the release's code (LTH14/mar) from a checkout. This project contains none of it."""

import functools
import importlib
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar_model.config import MARConfig

NEEDS = ("timm", "scipy", "tqdm", "numpy")


class ReleasedModel:
    """The release's MAR model of the same sizes on `device`, trained and sampled like in its scripts.

    On a CUDA device it uses its float16 autocast (with loss scaling in training), elsewhere float32.
    """

    def __init__(self, checkout: Path, config: MARConfig, device: torch.device, learning_rate: float, diffusion_steps: int) -> None:
        code = _import(checkout)
        if device.type != "cuda":  # the release's model calls .cuda(), which must be a no-op on other devices
            torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign, assignment]
        self.device, self.half = device, device.type == "cuda"
        self.precision = "float16" if self.half else "float32"
        self.model: Any = code.MAR(
            img_size=config.latent_size * 16,
            vae_stride=16,
            patch_size=config.patch_size,
            encoder_embed_dim=config.encoder_width,
            encoder_depth=config.encoder_depth,
            encoder_num_heads=config.encoder_heads,
            decoder_embed_dim=config.decoder_width,
            decoder_depth=config.decoder_depth,
            decoder_num_heads=config.decoder_heads,
            mlp_ratio=config.mlp_ratio,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            vae_embed_dim=config.latent_channels,
            class_num=config.classes,
            attn_dropout=config.attention_dropout,
            proj_dropout=config.projection_dropout,
            buffer_size=config.buffer_size,
            diffloss_d=config.denoiser_depth,
            diffloss_w=config.denoiser_width,
            num_sampling_steps=str(diffusion_steps),
            diffusion_batch_mul=config.diffusion_repeats,
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.02)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)

    def train_step(self, latents: Tensor, labels: Tensor, masked: int) -> None:
        """Forward, backward, clipping and AdamW, with `masked` tokens masked."""
        self.model.train()
        ratio = (masked - 0.5) / self.model.seq_len  # the release takes the ceiling, which gives `masked`
        self.model.mask_ratio_generator = types.SimpleNamespace(rvs=lambda _: [ratio])
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.half):
            loss = self.model(latents, labels)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the release's loss is {loss.item()}")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def generate(self, labels: Tensor, ar_steps: int, guidance: float) -> Tensor:
        """Latents (B, C, H, W), sampled with the linear guidance schedule."""
        self.model.eval()
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.half):
            return self.model.sample_tokens(  # type: ignore[no-any-return]
                bsz=labels.shape[0], num_iter=ar_steps, cfg=guidance, cfg_schedule="linear", labels=labels, temperature=1.0
            )


def _import(checkout: Path) -> types.ModuleType:
    """The checkout's `models.mar`. Exits with a message if something is missing."""
    if not (checkout / "models" / "mar.py").is_file():
        sys.exit(f"{checkout} has no models/mar.py; get the release with  git clone https://github.com/LTH14/mar {checkout}")
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"the release needs {', '.join(missing)}, which this environment does not have. Install outside of it:  "
            f"pip install --no-deps --target FOLDER {' '.join(missing)}  and then PYTHONPATH=FOLDER"
        )
    sys.path.insert(0, str(checkout))
    return importlib.import_module("models.mar")
