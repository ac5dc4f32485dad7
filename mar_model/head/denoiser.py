"""The denoising MLP, which predicts noise and variance of a token from its noised value, the time and the transformer's condition
(arXiv 2406.11838, section 4.2 and appendix; names as in the released checkpoints)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mar_model.blocks import NORM_EPS, run
from mar_model.head.diffusion import TRAINING_STEPS
from mar_model.linear import Linear

FREQUENCIES = 128  # sinusoids per phase in the time embedding


class TimeEmbedding(nn.Module):
    """256 sinusoids of t (cosines first), then an MLP with SiLU: (N,) → (N, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        exponents = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device) / FREQUENCIES
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """x + gate · MLP(norm(x) · (1 + scale) + shift), with shift, scale and gate from the condition y."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(torch.addcmul(shift, self.in_ln(x), 1 + scale))  # type: ignore[no-any-return]


class OutputLayer(nn.Module):
    """A norm without weights, modulated by y, and a linear layer to noise and variance."""

    def __init__(self, width: int, output: int) -> None:
        super().__init__()
        self.linear = Linear(width, output)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        norm = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        return self.linear(torch.addcmul(shift, norm, 1 + scale))  # type: ignore[no-any-return]


class Denoiser(nn.Module):
    """Predicts noise ε and the interpolation of the variance for noised tokens (N, D): output (N, 2D)."""

    def __init__(self, token_dim: int, condition_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.recompute = False  # see MAR.recompute_activations
        self.compiler = ""  # the backend of the compiled blocks, see MAR.compile_blocks
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = Linear(condition_width, width)
        self.input_proj = Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = OutputLayer(width, 2 * token_dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, weight in self.time_embed.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(weight, std=0.02)
        for module in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x (N, D) at training timesteps t (N,) for conditions z (N / R, W), which are repeated R times as a block."""
        condition = self.cond_embed(z).repeat(x.shape[0] // z.shape[0], 1)
        return self.denoise(x, self.embed_time(t) + condition)

    def embed_time(self, t: Tensor) -> Tensor:
        """Time embeddings (N, w) of t (N,). If N exceeds the number of timesteps, each timestep is embedded only once."""
        if t.numel() <= TRAINING_STEPS:
            return self.time_embed(t)  # type: ignore[no-any-return]
        return F.embedding(t, self.time_embed(torch.arange(TRAINING_STEPS, device=t.device)))

    def denoise(self, x: Tensor, y: Tensor) -> Tensor:
        """`forward` with y = time embedding + embedded condition (N, w), so that sampling embeds each condition once."""
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = run(block, x, y, recompute=self.recompute)
        return self.final_layer(x, y)  # type: ignore[no-any-return]
