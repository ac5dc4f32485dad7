"""Encoder and decoder of the convolutional autoencoders (arXiv 2112.10752, appendix E), and their sizes."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mar_model.tokenizers.layers import IMAGE_CHANNELS, Level, Middle, group_norm, silu


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of encoder and decoder; the defaults are those of the published KL-16.

    Raises ValueError with the name and value of a size that does not describe a network.
    """

    channels: int = 16  # latent channels
    width: int = 128  # base channels
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level / width; each further level halves the side
    encoder_blocks: int = 2  # residual blocks a level
    decoder_blocks: int = 3
    attention: bool = True  # self-attention in both middles and, by `level_attention`, in the lowest levels
    level_attention: Literal["none", "encoder", "both"] = "encoder"  # KL-16 of MAR: encoder; LDM's f16 files: both; LDM's kl-f8: none

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # JSON and YAML hold lists
        if not self.multipliers or not all(isinstance(one, int) and one > 0 for one in self.multipliers):
            raise ValueError(f"multipliers is {list(self.multipliers)}, expected one whole number above 0 for each level")
        for name in ("channels", "width", "encoder_blocks", "decoder_blocks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a whole number, 1 or more")
        if self.level_attention not in ("none", "encoder", "both"):
            raise ValueError(f"level_attention is {self.level_attention!r}, expected none, encoder or both")

    @property
    def stride(self) -> int:
        """Pixels per latent side."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def codebook(self) -> int:
        """Number of codes; 0 for a continuous tokenizer."""
        return 0

    @property
    def encoder_level_attention(self) -> bool:
        """Whether the residual blocks of the encoder's lowest level are each followed by attention."""
        return self.attention and self.level_attention != "none"

    @property
    def decoder_level_attention(self) -> bool:
        """Whether the residual blocks of the decoder's lowest level are each followed by attention."""
        return self.attention and self.level_attention == "both"


class Encoder(nn.Module):
    """(B, 3, H, W) → (B, outputs, H/stride, W/stride)."""

    def __init__(self, config: NetworkConfig, outputs: int) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        for index, (wide, outgoing) in enumerate(zip([config.width, *widths], widths, strict=False)):
            attention = config.encoder_level_attention and index == lowest
            self.down.append(Level(wide, outgoing, config.encoder_blocks, attention=attention, downsample=index < lowest))
        self.mid = Middle(widths[-1], config.attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """(B, channels, h, w) → (B, 3, stride·h, stride·w). Level 0 is the highest resolution, as in the encoder."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.attention)
        self.up = nn.ModuleList()
        for index, (wide, outgoing) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            attention = config.decoder_level_attention and index == lowest
            self.up.append(Level(wide, outgoing, config.decoder_blocks, attention=attention, upsample=index > 0))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], IMAGE_CHANNELS, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))  # type: ignore[no-any-return]

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the adversarial term's adaptive weight compares gradients."""
        weight: nn.Parameter = self.conv_out.weight  # type: ignore[assignment]
        return weight
