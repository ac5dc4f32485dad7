"""The codebook while it is trained: how often its codes are used, and the revival of those that no latent is near."""

import torch
from torch import Tensor

from mar_model.noise import stream
from mar_model.tokenizers import VQAutoencoder
from mar_model.tokenizers.quantizer import CodeUse, code_counts, code_use, revive
from pipelines.tokenizing.learning.workers import gathered, summed
from pipelines.tokenizing.settings import TokenizerSettings


class CodeWatch:
    """Counts the codes of all workers' batches. `idle` (codes,): images since a code was last the nearest one of a latent; `counts`
    (codes,): how often it was since the last call of `use`."""

    def __init__(self, tokenizer: VQAutoencoder, settings: TokenizerSettings, seed: int, workers: int) -> None:
        self.tokenizer, self.settings, self.seed, self.workers = tokenizer, settings, seed, workers
        device = tokenizer.quantize.embedding.weight.device
        self.idle = torch.zeros(tokenizer.codebook, dtype=torch.int64, device=device)
        self.counts = torch.zeros_like(self.idle)

    def count(self, indices: Tensor) -> None:
        """Take in the codes (B, h, w) of this worker's share of a batch."""
        counts = summed(code_counts(indices, self.tokenizer.codebook), self.workers)
        self.counts += counts
        self.idle = torch.where(counts > 0, 0, self.idle + self.settings.batch)

    def revive(self, latents: Tensor, images_seen: int, optimizer: torch.optim.Optimizer) -> None:
        """Replace the codes that have been idle for `revive_images` by latents (B, C, h, w) of this batch; their optimizer state is reset.

        The latents of all workers are candidates and the draw depends on `images_seen` alone, so all workers replace the same codes.
        """
        if not self.settings.revive_images:
            return
        dead = self.idle >= self.settings.revive_images
        if not bool(dead.any()):
            return
        candidates = gathered(latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]), self.workers)
        book = self.tokenizer.quantize.embedding.weight
        rows = revive(book.data, dead, candidates, stream(self.seed, "tokenize", "revive", images_seen))
        for name, value in optimizer.state.get(book, {}).items():
            if name != "step":
                value[rows] = 0
        self.idle[rows] = 0

    def use(self) -> CodeUse:
        """Perplexity and share of the codes that were used since the last call."""
        use = code_use(self.counts)
        self.counts.zero_()
        return use
