"""The KL-16 family: convolutional autoencoders whose latents are diagonal Gaussians.

Module and parameter names are those of the published `kl16.ckpt`, so that its state dict loads as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_CHANNELS = 3
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # moments are kept unclamped; the clamp belongs to their use


@dataclass(frozen=True)
class KLConfig:
    """Sizes of one autoencoder; the defaults are the published KL-16 (66,456,019 parameters).

    Raises ValueError with the name and value of a size that makes no network.
    """

    channels: int = 16  # latent channels
    width: int = 128  # base channels
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level / width; each further level halves the side
    encoder_blocks: int = 2  # residual blocks a level
    decoder_blocks: int = 3
    attention: bool = True  # in the encoder's lowest level and in both middles

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # JSON and YAML bring lists
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers is {list(self.multipliers)}, expected one whole number above 0 for each level")
        for name in ("channels", "width", "encoder_blocks", "decoder_blocks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a whole number, 1 or more")

    @property
    def stride(self) -> int:
        """Pixels per latent side."""
        return 1 << (len(self.multipliers) - 1)


def check_batch(name: str, values: Tensor, channels: int) -> None:
    """Raises ValueError where `values` are not floating-point numbers of shape (B, channels, height, width)."""
    if values.ndim != 4 or values.shape[1] != channels or not values.is_floating_point():
        raise ValueError(
            f"{name} have shape {tuple(values.shape)} and dtype {values.dtype}, expected (B, {channels}, height, width) floats"
        )


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
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        h += self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return h  # type: ignore[no-any-return]


def _silu(x: Tensor) -> Tensor:
    """SiLU of a norm's output, in its own memory where no gradient needs it: activations at full resolution are the largest there are."""
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


class Encoder(nn.Module):
    """(B, 3, H, W) → (B, 2·channels, H/stride, W/stride)."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(zip([config.width, *widths], widths, strict=False)):
            attention = config.attention and index == lowest
            self.down.append(Level(inputs, outputs, config.encoder_blocks, attention=attention, downsample=index < lowest))
        self.mid = Middle(widths[-1], config.attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(_silu(self.norm_out(self.mid(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """(B, channels, h, w) → (B, 3, stride·h, stride·w). Level 0 is the highest resolution, as in the encoder."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(config.channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.attention)
        self.up = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            self.up.append(Level(inputs, outputs, config.decoder_blocks, upsample=index > 0))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], IMAGE_CHANNELS, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_silu(self.norm_out(x)))  # type: ignore[no-any-return]


class KLAutoencoder(nn.Module):
    """A tokenizer of the KL-16 family (arXiv 2406.11838, section 4.1; the autoencoder is that of arXiv 2112.10752)."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.stride = config.stride
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → moments (B, 2·channels, H/stride, W/stride): mean, then unclamped log-variance.

        Raises ValueError where the stride does not divide H or W, and for images of another shape or dtype.
        """
        check_batch("images", images, IMAGE_CHANNELS)
        if images.shape[-2] % self.stride or images.shape[-1] % self.stride:
            raise ValueError(f"images are {images.shape[-2]}×{images.shape[-1]}, expected sides that {self.stride} divides")
        return self.quant_conv(self.encoder(images))  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, channels, h, w) in the tokenizer's own scale → images (B, 3, stride·h, stride·w), about [-1, 1].

        Raises ValueError for latents of another shape or dtype.
        """
        check_batch("latents", latents, self.channels)
        return self.decoder(self.post_quant_conv(latents))  # type: ignore[no-any-return]


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Moments (B, 2·C, h, w) and standard normal noise (B, C, h, w) → latents (B, C, h, w); log-variance clamped to [-30, 20].

    Raises ValueError where the two don't fit each other.
    """
    if moments.ndim != 4 or noise.shape != (moments.shape[0], moments.shape[1] // 2, *moments.shape[2:]):
        raise ValueError(f"moments have shape {tuple(moments.shape)}, noise {tuple(noise.shape)}, expected (B, 2·C, h, w) and (B, C, h, w)")
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)) * noise


def posterior_kl(moments: Tensor) -> Tensor:
    """KL(posterior ‖ standard normal) of each image in nats, summed over its latents: (B, 2·C, h, w) → (B,)."""
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(dim=1)
