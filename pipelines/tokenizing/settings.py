"""Section `tokenizer` of the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mar_model.tokenizers import KLConfig
from pipelines.runtime.settings import Count, NonNegative, Positive, identity, operational


@dataclass
class TokenizerSettings:
    """Section `tokenizer`."""

    path: str = operational("runs/mar/tokenizer", "directory of the tokenizer (written by `mar tokenize`)")
    kind: Literal["kl", "pixels"] = identity("kl", "kl (a KL autoencoder) or pixels (identity in [-1, 1], no training)")
    channels: Count = identity(16, "latent channels")
    width: Count = identity(128, "base channels of the convolutional autoencoder")
    multipliers: list[int] = identity(help="channel multiplier of each level; stride = 2^(levels − 1)", factory=lambda: [1, 1, 2, 2, 4])
    encoder_blocks: Count = identity(2, "residual blocks a level in the encoder")
    decoder_blocks: Count = identity(3, "residual blocks a level in the decoder")
    attention: bool = identity(True, "self-attention at the lowest resolution, as KL-16 has")
    images: Count = identity(5_000_000, "images seen in training, over which the learning rate falls to zero")
    batch: Count = identity(64, "images a step, over all workers")
    learning_rate: Positive = identity(1e-4, "AdamW learning rate, cosine to zero after a short warm-up")
    kl_weight: NonNegative = identity(1e-6, "weight of the KL term beside the reconstruction error, both summed over an image")
    workers: Count = operational(1, "Ray Train workers")
    precision: Literal["auto", "bf16", "float32"] = identity("auto", "auto (bf16 where the processor is fast at it), bf16 or float32")
    checkpoint_images: Count = operational(250_000, "images between the states that a killed run goes on from")

    @property
    def stride(self) -> int:
        """Pixels per latent side."""
        return 1 if self.kind == "pixels" else 2 ** (len(self.multipliers) - 1)

    def network(self) -> KLConfig:
        """The autoencoder's sizes. Raises ValueError where they make no network."""
        return KLConfig(self.channels, self.width, tuple(self.multipliers), self.encoder_blocks, self.decoder_blocks, self.attention)

    def relations(self) -> Iterator[tuple[str, str]]:
        """(field, what is wrong) of values that do not fit each other."""
        if not self.multipliers or min(self.multipliers) < 1:
            yield "multipliers", f"tokenizer.multipliers is {self.multipliers}, expected one number above 0 per level"
        if self.kind == "kl" and self.batch % self.workers:
            yield "batch", f"tokenizer.batch is {self.batch}, expected a multiple of tokenizer.workers, which is {self.workers}"

    def misfit_of(self, size: int) -> str:
        """What is wrong with images of this side, in pixels; empty if nothing is."""
        about = f"the tokenizer's stride {self.stride} (tokenizer.multipliers has {len(self.multipliers)} levels)"
        return f"images.size is {size}, expected a multiple of {about}" if size % self.stride else ""
