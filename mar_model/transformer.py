"""The pre-norm ViT block of MAR's encoder and decoder (arXiv 2406.11838, section 4.1; names as in the released checkpoints)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mar_model.blocks import NORM_EPS
from mar_model.dropout import Dropout, dropout
from mar_model.linear import Linear


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, N, W) at positions (B, P): (B, P, W)."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, W) with dropout on weights and output."""

    def __init__(self, width: int, heads: int, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (B, N, W) → outputs (B, P, W) of the tokens at `positions` (B, P), which attend to all N; without positions all N outputs."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, W / heads)
        if positions is not None:
            q = q.gather(2, positions[:, None, :, None].expand(-1, self.heads, -1, q.shape[3]))
        return self.proj_drop(self.proj(self._attend(q, k, v).transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.attention_dropout if self.training else 0.0
        if p == 0 or q.device.type != "cpu":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        weights = torch.softmax((q * q.shape[3] ** -0.5) @ k.transpose(2, 3), dim=3)  # CPU kernels do not fuse dropout
        return dropout(weights, p) @ v


class MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); (B, N, W) → (B, N, W), or only (B, P, W) at `positions` (B, P)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, attention_dropout, projection_dropout)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio), projection_dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        attended = self.attn(self.norm1(x), positions)
        x = attended + (x if positions is None else take(x, positions))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
