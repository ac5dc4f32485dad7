"""The layers of the convolutional autoencoders, and the check of a batch's shape.

Module and parameter names are those of the published files (`kl16.ckpt`, LDM's first stages), so that their state dicts load unchanged.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_CHANNELS = 3


def check_batch(name: str, values: Tensor, channels: int) -> None:
    """Raise ValueError where `values` are not floating-point numbers of shape (B, channels, height, width)."""
    if values.ndim != 4 or values.shape[1] != channels or not values.is_floating_point():
        raise ValueError(
            f"{name} have shape {tuple(values.shape)} and dtype {values.dtype}, expected (B, {channels}, height, width) floats"
        )


def check_sides(images: Tensor, stride: int) -> None:
    """Raise ValueError unless `stride` divides both sides of `images` (B, 3, H, W)."""
    if images.shape[-2] % stride or images.shape[-1] % stride:
        raise ValueError(f"images are {images.shape[-2]}×{images.shape[-1]}, expected sides that {stride} divides")


def without_variance(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as moments (B, 2·C, h, w) whose log-variance is -30, the smallest that is used: noise of 3e-7."""
    return torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, as published; of narrower or odd widths the largest number of groups below that divides them."""
    groups = next(count for count in range(min(32, channels), 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """(norm, swish, 3×3 convolution) twice, around a shortcut that is a 1×1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        h += self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return h  # type: ignore[no-any-return]


def silu(x: Tensor) -> Tensor:
    """SiLU of a norm's output, in place where no gradient needs it: activations at full resolution are the largest."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class AttentionBlock(nn.Module):
    """Single-head self-attention over positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.q, self.k, self.v))  # (B, 1, h·w, W)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Half the side: a stride-2 3×3 convolution, padded on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if asked for, then a change of resolution if any."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, *, attention: bool = False, downsample: bool = False, upsample: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList([ResidualBlock(inputs if index == 0 else outputs, outputs) for index in range(blocks)])
        self.attn = nn.ModuleList([AttentionBlock(outputs) for _ in range(blocks)] if attention else [])
        if downsample:
            self.downsample = Downsample(outputs)
        if upsample:
            self.upsample = Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    """Two residual blocks around attention, at the lowest resolution."""

    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        if attention:
            self.attn_1 = AttentionBlock(width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)  # type: ignore[no-any-return]
