"""Section `tokenizer` of the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mar_model.tokenizers import KLConfig, VQConfig
from pipelines.runtime.settings import Count, NonNegative, Positive, ShareBelowOne, Whole, identity, operational

TRAINED = ("kl", "vq")  # kinds that `mar tokenize` trains


@dataclass
class TokenizerSettings:
    """Section `tokenizer`."""

    path: str = operational("runs/mar/tokenizer", "directory of the tokenizer (written by `mar tokenize`)")
    kind: Literal["kl", "vq", "pixels"] = identity(
        "kl", "kl (a KL autoencoder), vq (an autoencoder with a codebook) or pixels (identity in [-1, 1], no training)"
    )
    channels: Count = identity(16, "latent channels")
    width: Count = identity(128, "base channels of the convolutional autoencoder")
    multipliers: list[int] = identity(help="channel multiplier of each level; stride = 2^(levels − 1)", factory=lambda: [1, 1, 2, 2, 4])
    encoder_blocks: Count = identity(2, "residual blocks a level in the encoder")
    decoder_blocks: Count = identity(3, "residual blocks a level in the decoder")
    attention: bool = identity(True, "self-attention at the lowest resolution, as KL-16 has")
    level_attention: Literal["none", "encoder", "both"] = identity(
        "encoder", "where the blocks of the lowest level have attention too: none, encoder or both", added=True
    )
    codes: Count = identity(16_384, "codes of the codebook (vq)", added=True)
    init_from: str = operational("", "tokenizer directory with the initial weights (trained or imported); empty: random weights")
    train: Literal["all", "decoder"] = identity(
        "all", "all, or decoder: encoder and codebook of tokenizer.init_from stay as they are, and so do cached latents", added=True
    )
    images: Count = identity(5_000_000, "images seen in training, over which the learning rate falls to zero")
    batch: Count = identity(64, "images a step, over all workers")
    micro_batch: Whole = operational(0, "images per forward pass of a worker (gradient accumulation); 0: its whole share of the batch")
    learning_rate: Positive = identity(1e-4, "AdamW learning rate, cosine to zero after a short warm-up")
    schedule: Literal["cosine", "constant"] = identity("cosine", "cosine (to zero at tokenizer.images) or constant", added=True)
    beta1: ShareBelowOne = identity(0.9, "AdamW beta 1", added=True)
    beta2: ShareBelowOne = identity(0.95, "AdamW beta 2", added=True)
    weight_decay: NonNegative = identity(0.01, "AdamW weight decay", added=True)
    ema_decay: ShareBelowOne = identity(0.0, "decay of the weights' moving average per step, which is saved; 0: none", added=True)
    l1_weight: NonNegative = identity(0.0, "weight of the absolute error per pixel value", added=True)
    l2_weight: NonNegative = identity(1.0, "weight of the squared error per pixel value", added=True)
    kl_weight: NonNegative = identity(1e-6, "weight of the KL term beside the reconstruction error, both summed over an image")
    learned_variance: bool = identity(False, "divide the reconstruction error by a learned variance (kl)", added=True)
    quantizer_loss: Literal["published", "corrected"] = identity(
        "published", "published (commitment weighted 1, codebook 0.25, as LDM's files were trained) or corrected (vq)", added=True
    )
    revive_images: Whole = identity(
        0, "replace codes that were not the nearest of any latent for so many images by latents; 0: never (vq)", added=True
    )
    perceptual_weight: NonNegative = identity(0.0, "weight of the perceptual distance; 0: none", added=True)
    perceptual: Literal["lpips", "efficientnet-lite0"] = identity(
        "lpips", "lpips (VGG16, from tokenizer.perceptual_weights) or efficientnet-lite0 (distance of its features, unweighted)", added=True
    )
    perceptual_weights: str = operational("", "VGG16's ImageNet weights for lpips: vgg16-397923af.pth of torchvision")
    adversarial_weight: NonNegative = identity(0.0, "weight of the adversarial term beside its adaptive weight; 0: none", added=True)
    adversarial_start: Whole = identity(0, "images seen before the adversarial term begins", added=True)
    discriminator_width: Count = identity(64, "channels of the discriminator's first layer", added=True)
    discriminator_layers: Count = identity(3, "strided layers of the discriminator", added=True)
    workers: Count = operational(1, "Ray Train workers")
    precision: Literal["auto", "bf16", "float32"] = identity("auto", "auto (bf16 where the processor is fast at it), bf16 or float32")
    channels_last: bool = operational(False, "keep activations in channels-last order: faster on GPUs with bf16")
    compile: bool = operational(False, "torch.compile encoder and decoder: takes minutes once, then faster on a GPU")
    activation_checkpointing: bool = operational(False, "recompute the activations of each level in the backward pass: saves memory")
    checkpoint_images: Count = operational(250_000, "images between the states that a killed run goes on from")
    validation_images: Whole = operational(0, "images between measurements of PSNR on held-out images; 0: only at the end")
    failures: Whole = operational(3, "number of worker failures, or of consecutive failed starts, before the run ends")
    hang_seconds: Count = operational(600, "time after which a worker that the others wait for counts as hung, and the group is restarted")

    @property
    def stride(self) -> int:
        """Pixels per latent side."""
        return 1 if self.kind == "pixels" else 2 ** (len(self.multipliers) - 1)

    @property
    def trained(self) -> bool:
        """Whether `mar tokenize` trains this kind."""
        return self.kind in TRAINED

    def network(self) -> KLConfig | VQConfig:
        """The autoencoder's sizes. Raises ValueError where they make no network."""
        sizes = (
            self.channels, self.width, tuple(self.multipliers), self.encoder_blocks, self.decoder_blocks, self.attention,
            self.level_attention,
        )  # fmt: skip
        return VQConfig(*sizes, codes=self.codes) if self.kind == "vq" else KLConfig(*sizes)

    def relations(self) -> Iterator[tuple[str, str]]:
        """(field, what is wrong) of values that do not fit each other."""
        if not self.multipliers or min(self.multipliers) < 1:
            yield "multipliers", f"tokenizer.multipliers is {self.multipliers}, expected one number above 0 per level"
        share = self.batch // self.workers
        if self.trained and self.batch % self.workers:
            yield "batch", f"tokenizer.batch is {self.batch}, expected a multiple of tokenizer.workers, which is {self.workers}"
        elif self.trained and self.micro_batch and share % self.micro_batch:
            about = f"a divisor of a worker's share of the batch, {share}"
            yield "micro_batch", f"tokenizer.micro_batch is {self.micro_batch}, expected {about}"
        if self.trained and not (self.l1_weight or self.l2_weight):
            yield "l2_weight", "tokenizer.l1_weight and tokenizer.l2_weight are both 0, expected at least one reconstruction term"
        if self.train == "decoder" and not self.init_from:
            yield "train", "tokenizer.train is decoder, expected a tokenizer whose encoder is kept in tokenizer.init_from"
        if self.learned_variance and self.kind == "vq":
            yield "learned_variance", "tokenizer.learned_variance is true, expected false with tokenizer.kind=vq, which has no likelihood"

    def misfit_of(self, size: int) -> str:
        """What is wrong with images of this side, in pixels; empty if nothing is."""
        about = f"the tokenizer's stride {self.stride} (tokenizer.multipliers has {len(self.multipliers)} levels)"
        return f"images.size is {size}, expected a multiple of {about}" if size % self.stride else ""
