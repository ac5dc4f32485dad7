"""MAR: a masked autoencoder whose decoder conditions a small diffusion model on each token (arXiv 2406.11838)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mar_model.blocks import NORM_EPS, run
from mar_model.config import MARConfig
from mar_model.head.denoiser import Denoiser
from mar_model.head.diffusion import Diffusion, TokenLoss
from mar_model.linear import Linear
from mar_model.transformer import Block, take


class TrainingDraws(NamedTuple):
    """The random draws of one forward pass over B images of L tokens, M of them masked, R times each (without dropout)."""

    orders: Tensor  # (B, L) int64, the generation order; its first M tokens are masked
    label_dropped: Tensor  # (B,) bool, images that see the unconditional vector
    timesteps: Tensor  # (R, B, M) int64 in 0…999; tokens by position
    noise: Tensor  # (R, B, M, D) float32


class DiffusionHead(nn.Module):
    """The denoiser and its training schedule. A separate module, because released checkpoints name its parameters `diffloss.net`."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.net = Denoiser(config.token_dim, config.decoder_width, config.denoiser_width, config.denoiser_depth)
        self.diffusion = Diffusion()

    def forward(self, x0: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> TokenLoss:
        """Losses of clean tokens x0 (N, D) at timesteps t (N,) for conditions z (N / R, W), which are repeated R times as a block."""
        xt = self.diffusion.noised(x0, t, noise)
        return self.diffusion.loss(self.net(xt, t, z), x0, xt, t, noise)


class MAR(nn.Module):
    """Encoder, decoder and denoiser. The state dict has the names and shapes of the released checkpoints."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.compiler = ""  # the backend of the compiled blocks; empty: eager
        length, buffer = config.tokens, config.buffer_size
        width, decoder_width = config.encoder_width, config.decoder_width
        dropouts = (config.attention_dropout, config.projection_dropout)

        self.class_emb = nn.Embedding(config.classes, width)
        self.fake_latent = nn.Parameter(torch.empty(1, width))  # replaces the class embedding of images without label
        self.z_proj = Linear(config.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer + length, width))
        self.encoder_blocks = nn.ModuleList(
            Block(width, config.encoder_heads, config.mlp_ratio, *dropouts) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPS)

        self.decoder_embed = Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer + length, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, config.decoder_heads, config.mlp_ratio, *dropouts) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, length, decoder_width))

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for tensor in (
            self.class_emb.weight, self.fake_latent, self.mask_token, self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned,
        ):  # fmt: skip
            nn.init.normal_(tensor, std=0.02)
        self.diffloss = DiffusionHead(config)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks of transformer and denoiser in place with `torch.compile`. Parameter names and weights do not change.

        Lengths are symbolic, so other masks, batch sizes and AR steps need no recompilation.
        """
        import torch._dynamo  # here, because importing it takes seconds

        # All blocks of a kind share compiled code, with these variants: training or not, autocast or not, encoder or decoder width, the
        # last decoder block, one image or more, one token or more
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in (*self.encoder_blocks, *self.decoder_blocks, *self.diffloss.net.res_blocks):
            block.compile(dynamic=True, backend=backend)
        self.compiler = self.diffloss.net.compiler = backend

    def recompute_activations(self) -> None:
        """Enable activation (gradient) checkpointing: the backward pass computes a block's activations again (`run`)."""
        self.recompute = self.diffloss.net.recompute = True

    def patchify(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) → tokens (B, L, D); within a token the order is channel, row, column."""
        patch, channels = self.config.patch_size, self.config.latent_channels
        batch, side = latents.shape[0], self.config.latent_size // patch
        grid = latents.reshape(batch, channels, side, patch, side, patch)
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, self.config.token_dim)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) → latents (B, C, H, W)."""
        patch, channels, size = self.config.patch_size, self.config.latent_channels, self.config.latent_size
        batch, side = tokens.shape[0], size // patch
        grid = tokens.reshape(batch, side, side, channels, patch, patch)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, size, size)

    def class_embedding(self, labels: Tensor, dropped: Tensor) -> Tensor:
        """Embedding (B, W) of labels (B,), with the unconditional vector where `dropped` (B,) is true."""
        return torch.where(dropped[:, None], self.fake_latent, self.class_emb(labels))

    def encode(self, tokens: Tensor, kept: Tensor, class_embedding: Tensor) -> Tensor:
        """Encode the buffer and the kept tokens, at ascending positions `kept` (B, K): (B, buffer + K, W)."""
        batch, buffer = tokens.shape[0], self.config.buffer_size
        positions = self.encoder_pos_embed_learned
        chosen = self.z_proj(take(tokens, kept)) + F.embedding(kept, positions[0, buffer:])
        front = class_embedding[:, None].expand(batch, buffer, -1) + positions[:, :buffer]
        x = self.z_proj_ln(torch.cat([front.to(chosen.dtype), chosen], dim=1))
        for block in self.encoder_blocks:
            x = run(block, x, recompute=self.recompute)
        return self.encoder_norm(x)  # type: ignore[no-any-return]

    def decode(self, encoded: Tensor, kept: Tensor, positions: Tensor | None = None) -> Tensor:
        """Conditions z (B, P, W) of the tokens at `positions` (B, P), or of all L tokens, from the encoded kept tokens.

        The last block computes only these positions, because its other outputs are not used.
        """
        buffer = self.config.buffer_size
        x = self.decoder_embed(encoded)
        width = x.shape[2]
        tokens = self.mask_token.to(x.dtype).expand(x.shape[0], self.config.tokens, -1)
        tokens = tokens.scatter(1, kept[:, :, None].expand(-1, -1, width), x[:, buffer:])
        x = torch.cat([x[:, :buffer], tokens], dim=1) + self.decoder_pos_embed_learned
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = run(block, x, recompute=self.recompute)
        if positions is None:
            x = self.decoder_norm(run(last, x, recompute=self.recompute))
            return x[:, buffer:] + self.diffusion_pos_embed_learned  # type: ignore[no-any-return]
        x = run(last, x, positions + buffer, recompute=self.recompute)
        return self.decoder_norm(x) + F.embedding(positions, self.diffusion_pos_embed_learned[0])  # type: ignore[no-any-return]

    def forward(
        self, latents: Tensor, labels: Tensor | None, masked: int, draws: TrainingDraws, *, finite: bool = True
    ) -> tuple[TokenLoss, Tensor]:
        """Losses of the masked tokens of normalised latents (B, C, H, W), and their timesteps. Without labels (B,) every image gets the
        unconditional vector.

        Each of the three losses and the timesteps have the shape (R·B·M,): every masked token counts R times. Raises ValueError for
        inconsistent shapes and dtypes, and on the CPU for labels out of range and non-finite latents (the latter not with finite=False,
        if the caller checks the loss). On a GPU values are not checked, because that would synchronise.
        """
        if labels is None:
            labels = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
            draws = draws._replace(label_dropped=torch.ones_like(draws.label_dropped))
        self._check(latents, labels, masked, draws, finite)
        positions = draws.orders[:, :masked].sort(dim=1).values
        kept = draws.orders[:, masked:].sort(dim=1).values
        tokens = self.patchify(latents)
        z = self.decode(self.encode(tokens, kept, self.class_embedding(labels, draws.label_dropped)), kept, positions)
        target = take(tokens, positions).flatten(0, 1).repeat(draws.timesteps.shape[0], 1)  # (R·B·M, D)
        timesteps = draws.timesteps.reshape(-1)
        return self.diffloss(target, z.flatten(0, 1), timesteps, draws.noise.reshape(-1, self.config.token_dim)), timesteps

    def _check(self, latents: Tensor, labels: Tensor, masked: int, draws: TrainingDraws, finite: bool) -> None:
        config, batch = self.config, len(latents)
        if not 1 <= masked <= config.tokens:
            raise ValueError(f"masked is {masked}, expected 1 to {config.tokens} (the tokens of an image)")
        repeats = draws.timesteps.shape[0]
        floating, integer = (torch.float32, torch.bfloat16, torch.float16), (torch.int64, torch.int32)
        for name, tensor, shape, dtypes in (
            ("latents", latents, (batch, config.latent_channels, config.latent_size, config.latent_size), floating),
            ("labels", labels, (batch,), integer),
            ("draws.orders", draws.orders, (batch, config.tokens), (torch.int64,)),
            ("draws.label_dropped", draws.label_dropped, (batch,), (torch.bool,)),
            ("draws.timesteps", draws.timesteps, (repeats, batch, masked), integer),
            ("draws.noise", draws.noise, (repeats, batch, masked, config.token_dim), floating),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                expected = " or ".join(str(one) for one in dtypes)
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected {shape} and {expected}")
        if labels.device.type == "cpu":
            check_classes(labels, config.classes)
        if finite and latents.device.type == "cpu" and not bool(latents.isfinite().all()):
            broken = (~latents.isfinite()).sum(dim=(1, 2, 3)).nonzero().flatten().tolist()
            raise ValueError(f"latents are NaN or infinite in images {broken[:5]} of {batch}, expected none")


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label out of range. Synchronises with the device of the labels."""
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(f"labels range from {int(labels.min())} to {int(labels.max())}, expected 0 to {classes - 1}")
