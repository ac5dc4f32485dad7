"""The quantizer of a VQ autoencoder (arXiv 1711.00937): nearest codes, its loss, the use of its codes, and the revival of dead ones."""

import math
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mar_model.tokenizers.layers import check_batch

COMMITMENT = 0.25  # weight of the smaller one of the two loss terms, as published
DISTANCES_AT_ONCE = 1 << 24  # 64 MiB of float32


class Quantized(NamedTuple):
    """Latents (B, C, h, w), and the number of the nearest code at each position, (B, h, w) int64."""

    latents: Tensor
    indices: Tensor


class Codebook(nn.Module):
    """`codes` rows of `channels` values each; called, it quantizes. Distances are computed in float32 whatever the autocast."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)  # as published

    def forward(self, latents: Tensor) -> Quantized:
        """(B, C, h, w) → the nearest code at each position, with gradients to the codebook but none to `latents`.

        Raises ValueError for latents of another shape or dtype.
        """
        check_batch("latents", latents, self.embedding.embedding_dim)
        indices = self.nearest(latents)
        return Quantized(self.rows(indices), indices)

    def nearest(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → the row with the smallest squared distance at each position, (B, h, w) int64; of equal ones the first."""
        full = nullcontext() if latents.is_meta else torch.autocast(latents.device.type, enabled=False)
        with torch.no_grad(), full:
            book = self.embedding.weight.float()
            vectors = latents.float().permute(0, 2, 3, 1).reshape(-1, book.shape[1])
            norms = book.square().sum(dim=1)
            parts = vectors.split(max(1, DISTANCES_AT_ONCE // len(book)))
            # the vector's own norm is the same for all codes: left out, which also keeps small differences between codes
            found = [torch.addmm(norms, part, book.T, alpha=-2).argmin(dim=1) for part in parts]
        return torch.cat(found).view(latents.shape[0], *latents.shape[2:])

    def codes(self, indices: Tensor) -> Tensor:
        """(B, h, w) integers → codes (B, C, h, w). Raises ValueError for another shape, and for numbers that no code has."""
        if indices.ndim != 3 or indices.is_floating_point():
            raise ValueError(f"indices have shape {tuple(indices.shape)} and dtype {indices.dtype}, expected (B, h, w) integers")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.embedding.num_embeddings:
            raise ValueError(
                f"indices are between {int(indices.min())} and {int(indices.max())}, expected 0 to {self.embedding.num_embeddings - 1}"
            )
        return self.rows(indices)

    def rows(self, indices: Tensor) -> Tensor:
        """As `codes`, of numbers that are known to be codes."""
        return self.embedding(indices.long()).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The values of `codes`, with gradients that reach `latents` unchanged (arXiv 1711.00937, section 3.2)."""
    return latents + (codes - latents).detach()


def quantizer_loss(latents: Tensor, codes: Tensor, form: Literal["published", "corrected"] = "published") -> Tensor:
    """Codebook and commitment term, means over all values: two (B, C, h, w) → ().

    corrected: mean((codes − sg[latents])²) + 0.25·mean((latents − sg[codes])²), as arXiv 1711.00937 (eq. 3) defines it. published: the
    0.25 weighs the codebook term instead, as in the training of LDM's files. The values are equal, the gradients are not.
    """
    codebook, commitment = (codes - latents.detach()).square().mean(), (latents - codes.detach()).square().mean()
    return COMMITMENT * codebook + commitment if form == "published" else codebook + COMMITMENT * commitment


class CodeUse(NamedTuple):
    """`perplexity`: exp of the entropy of the codes' frequencies, from 1 (one code) to the number of codes (all alike). `used`: share
    of the codes that occurred."""

    perplexity: float
    used: float


def code_counts(indices: Tensor, codes: int) -> Tensor:
    """How often each code occurs: integers of any shape → (codes,) int64."""
    return torch.bincount(indices.flatten().long(), minlength=codes)


def code_use(counts: Tensor) -> CodeUse:
    """Of the counts (codes,) of all codes; NaN where nothing was counted."""
    total = float(counts.sum())
    if total == 0:
        return CodeUse(math.nan, math.nan)
    shares = counts.double() / total
    return CodeUse(float(torch.special.entr(shares).sum().exp()), float((counts > 0).double().mean()))


@torch.no_grad()
def revive(book: Tensor, dead: Tensor, candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Replace, in place, the rows of `book` (codes, C) where `dead` (codes,) is true by vectors drawn from `candidates` (N, C), encoder
    outputs; each is taken once before any is taken twice. Returns the numbers of the replaced rows."""
    rows = dead.nonzero()[:, 0]
    if len(rows) and len(candidates):
        rounds = -(-len(rows) // len(candidates))
        order = torch.cat([torch.randperm(len(candidates), generator=generator) for _ in range(rounds)])[: len(rows)]
        book[rows] = candidates[order.to(candidates.device)].to(book.dtype)
        return rows
    return rows[:0]
