"""The sizes of a MAR model, as one flat dataclass that is stored in every checkpoint."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """The user's choices about the model. The defaults are the published base model
    (arXiv 2406.11838, section 4.2; released checkpoints: denoiser 6/1024)."""

    patch_size: int = 1  # latents per token side
    encoder_depth: int = 12
    encoder_width: int = 768
    encoder_heads: int = 12
    decoder_depth: int = 12
    decoder_width: int = 768
    decoder_heads: int = 12
    mlp_ratio: float = 4.0
    buffer_size: int = 64  # positions before the tokens that hold the class embedding
    attention_dropout: float = 0.1
    projection_dropout: float = 0.1
    label_drop: float = 0.1  # share of images trained without their label (classifier-free guidance)
    denoiser_depth: int = 6
    denoiser_width: int = 1024
    diffusion_repeats: int = 4  # timesteps and noises drawn per masked token in training
    mask_ratio_mean: float = 1.0  # mode of the truncated normal that the mask ratio is drawn from
    mask_ratio_std: float = 0.25
    mask_ratio_min: float = 0.7

    def check(self) -> None:
        """Raise ValueError with names and values where sizes do not fit each other."""
        for name in (
            "patch_size", "encoder_depth", "encoder_width", "encoder_heads", "decoder_depth", "decoder_width", "decoder_heads",
            "buffer_size", "denoiser_depth", "denoiser_width", "diffusion_repeats",
        ):  # fmt: skip
            _check_count(name, getattr(self, name))
        for half in ("encoder", "decoder"):
            width, heads = getattr(self, f"{half}_width"), getattr(self, f"{half}_heads")
            if width % heads:
                raise ValueError(f"{half}_heads is {heads}, expected a divisor of {half}_width, which is {width}")
            if not 1 <= width * self.mlp_ratio < float("inf"):
                raise ValueError(f"mlp_ratio is {self.mlp_ratio}, expected an MLP of at least 1 value at {half}_width {width}")
        for name in ("attention_dropout", "projection_dropout", "label_drop", "mask_ratio_min"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")
        if not 0.0 < self.mask_ratio_std < float("inf"):
            raise ValueError(f"mask_ratio_std is {self.mask_ratio_std}, expected a number above 0")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value}, expected a whole number above 0")


def _published(depth: int, width: int, heads: int, denoiser_depth: int, denoiser_width: int) -> Architecture:
    return Architecture(
        encoder_depth=depth, encoder_width=width, encoder_heads=heads, decoder_depth=depth, decoder_width=width, decoder_heads=heads,
        denoiser_depth=denoiser_depth, denoiser_width=denoiser_width,
    )  # fmt: skip


PUBLISHED = {  # the released models, whose encoder and decoder have equal sizes
    "mar_base": _published(12, 768, 12, 6, 1024),
    "mar_large": _published(16, 1024, 16, 8, 1280),
    "mar_huge": _published(20, 1280, 16, 12, 1536),
}


@dataclass(frozen=True)
class MARConfig(Architecture):
    """An architecture, with the sizes that the data determines: latent side and channels, number of classes.

    Raises ValueError with names and values if sizes are invalid or do not fit each other.
    """

    latent_size: int = 16  # latents per image side (256 px at stride 16)
    latent_channels: int = 16
    classes: int = 1000

    def __post_init__(self) -> None:
        self.check()
        for name in ("latent_size", "latent_channels", "classes"):
            _check_count(name, getattr(self, name))
        if self.latent_size % self.patch_size:
            raise ValueError(f"patch_size is {self.patch_size}, expected a divisor of latent_size, which is {self.latent_size}")

    @property
    def tokens(self) -> int:
        """Tokens per image, L."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        """Values per token, D."""
        return self.latent_channels * self.patch_size**2
