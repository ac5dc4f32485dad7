"""Conditions from features of earlier AR steps: a fast mode after "LazyMAR: Accelerating Masked Autoregressive Models via Feature
Caching" (ICCV 2025, arXiv 2503.12450)."""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mar_model.mar import MAR
from mar_model.transformer import Block, take

COMPLETE_SHARE = 0.3  # share of the AR steps at the beginning that compute everything, because the image changes most there


def is_complete(step: int, ar_steps: int, reuse_steps: int) -> bool:
    """Whether AR step `step` of `ar_steps` computes everything: the first steps, then every (1 + `reuse_steps`)th."""
    since = step - (math.ceil(COMPLETE_SHARE * ar_steps) - 1)
    return since <= 0 or since % (1 + reuse_steps) == 0


class FeatureReuse:
    """The transformer of one generation, in which each complete AR step is followed by `reuse_steps` steps that compute few positions.

    In the conditional half, these steps compute the buffer, the tokens drawn in the previous step and the tokens to draw now. They attend
    to the last computed keys and values of all other positions (the paper's token cache). In the unconditional half they compute
    nothing: its conditions are the conditional ones plus the difference at the last complete step (the paper's condition cache).

    The caches and the schedule of complete steps are as in the paper. Difference: the paper also recomputes a decreasing share of the
    other tokens, those whose features changed most in the first layers. Without it nothing has to be compared, and all images of a batch
    compute the same number of positions.
    """

    def __init__(self, model: MAR, embedding: Tensor, batch: int, ar_steps: int, reuse_steps: int) -> None:
        """embedding: class embeddings (B, W), or (2B, W) with the unconditional half last."""
        config = model.config
        self.model, self.embedding, self.batch = model, embedding, batch
        self.ar_steps, self.reuse_steps = ar_steps, reuse_steps
        self._encoder = [_Layer(block, model.compiler) for block in model.encoder_blocks]  # type: ignore[arg-type]
        self._decoder = [_Layer(block, model.compiler) for block in model.decoder_blocks]  # type: ignore[arg-type]
        self._positions = torch.arange(config.buffer_size + config.tokens, device=embedding.device).repeat(batch, 1)
        self._decoder_input: Tensor | None = None  # (B, buffer + L, W)
        self._difference: Tensor | None = None  # (B, L, W), unconditional − conditional conditions
        self._drawn_before: Tensor | None = None  # (B, M)

    def conditions(self, step: int, tokens: Tensor, kept: Tensor, positions: Tensor) -> Tensor:
        """z at `positions` (B, M), given the known tokens (B, L, D) at `kept` (B, K): (B, M, W), or (2B, M, W) when guided."""
        complete = self._drawn_before is None or is_complete(step, self.ar_steps, self.reuse_steps)
        buffer = self._positions[:, : self.model.config.buffer_size]
        if complete:
            z = self._complete(tokens, kept)
            found = take(z, positions.repeat(z.shape[0] // self.batch, 1))
        else:
            self._encode(tokens, kept, self._drawn_before)  # type: ignore[arg-type]
            rows = torch.cat([self._drawn_before, positions], dim=1) + buffer.shape[1]  # type: ignore[list-item]
            conditional = self._decode(torch.cat([buffer, rows], dim=1))[:, -positions.shape[1] :]
            conditional = conditional + self.model.diffusion_pos_embed_learned[0][positions]
            found = conditional
            if self._difference is not None:
                found = torch.cat([conditional, conditional + take(self._difference, positions)])
        self._drawn_before = positions
        return found

    def _complete(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """z of all tokens, (B, L, W) or (2B, L, W); fills the caches."""
        self._encode(tokens, kept, kept)
        conditional = self._decode(self._positions)[:, self.model.config.buffer_size :] + self.model.diffusion_pos_embed_learned
        if self.embedding.shape[0] == self.batch:
            return conditional
        unconditional = self.model.decode(self.model.encode(tokens, kept, self.embedding[self.batch :]), kept)
        self._difference = unconditional - conditional
        return torch.cat([conditional, unconditional])

    def _encode(self, tokens: Tensor, kept: Tensor, computed: Tensor) -> None:
        """Encode the buffer and the tokens at `computed` (B, M), which attend to those at `kept` (B, K), into the decoder's input."""
        model = self.model
        buffer, learned = self._positions[:, : model.config.buffer_size], model.encoder_pos_embed_learned
        front = self.embedding[: self.batch, None] + learned[:, : buffer.shape[1]]
        chosen = model.z_proj(take(tokens, computed)) + learned[0, buffer.shape[1] :][computed]
        x = model.z_proj_ln(torch.cat([front.to(chosen.dtype), chosen], dim=1))
        rows, seen = (torch.cat([buffer, one + buffer.shape[1]], dim=1) for one in (computed, kept))
        for layer in self._encoder:
            x = layer.advance(x, rows, self._positions.shape[1], seen)
        x = model.decoder_embed(model.encoder_norm(x))
        if self._decoder_input is None:
            self._decoder_input = model.mask_token.to(x.dtype).repeat(self.batch, self._positions.shape[1], 1)
        self._decoder_input.scatter_(1, rows[:, :, None].expand_as(x), x)

    def _decode(self, rows: Tensor) -> Tensor:
        """The decoder's output (B, M, W) at `rows` (B, M) of buffer and tokens."""
        x = take(self._decoder_input, rows) + self.model.decoder_pos_embed_learned[0][rows]  # type: ignore[arg-type]
        for layer in self._decoder:
            x = layer.advance(x, rows, self._positions.shape[1])
        return self.model.decoder_norm(x)  # type: ignore[no-any-return]


class _Layer:
    """A block, with the last computed keys and values of all positions."""

    def __init__(self, block: Block, compiler: str) -> None:
        self.block = block
        self._advance = _compiled(compiler) if compiler else _advance
        self._keys_values: Tensor | None = None  # (B, N, 2W)

    def advance(self, x: Tensor, rows: Tensor, positions: int, seen: Tensor | None = None) -> Tensor:
        """The block's output (B, M, W) for inputs x at `rows` (B, M) of N `positions`, which attend to `seen` (B, K; None: all)."""
        if self._keys_values is None:
            kind = x.device.type
            autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
            self._keys_values = torch.zeros(len(x), positions, 2 * x.shape[2], dtype=dtype, device=x.device)
        return self._advance(self.block, x, rows, seen, self._keys_values)


def _advance(block: Block, x: Tensor, rows: Tensor, seen: Tensor | None, kept: Tensor) -> Tensor:
    """The output of `block` for x at `rows`; their keys and values are written to `kept` (B, N, 2W)."""
    width, heads = x.shape[2], block.attn.heads
    queries, keys_values = block.attn.qkv(block.norm1(x)).split([width, 2 * width], dim=2)
    kept.scatter_(1, rows[:, :, None].expand_as(keys_values), keys_values)
    attended_to = kept if seen is None else take(kept, seen)
    q, k, v = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (queries, *attended_to.chunk(2, dim=2)))
    x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]


@cache
def _compiled(backend: str) -> Callable[[Block, Tensor, Tensor, Tensor | None, Tensor], Tensor]:
    """`_advance` compiled like the blocks in `MAR.compile_blocks`, once for all blocks, which share the code."""
    return torch.compile(_advance, dynamic=True, backend=backend)
