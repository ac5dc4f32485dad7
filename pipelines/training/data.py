"""What a training worker reads: the micro-batches that are its share of each global batch, prepared one step ahead."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mar_model.config import MARConfig
from mar_model.mar import TrainingDraws
from mar_model.masking import draw_mask_ratio, masked_tokens
from mar_model.noise import stream
from mar_model.training.recipe import micro_batch_draws
from pipelines.caching.latent_cache import LatentCache
from pipelines.training.latent_dataset import LatentDataset


class MicroBatch(NamedTuple):
    """One forward pass: B images whose latents are still posterior moments, and all its randomness."""

    moments: Tensor  # (B, 2C, H, W) in the cache's dtype
    labels: Tensor  # (B,) int64
    posterior_noise: Tensor  # (B, C, H, W) float32
    draws: TrainingDraws
    dropout_seed: int


class GlobalBatch(NamedTuple):
    """One worker's share of the global batch that begins at `images_seen`."""

    images_seen: int
    masked: int  # masked tokens of each image, one length for the whole global batch
    micro_batches: list[MicroBatch]


def share_of(worker: int, workers: int, micro_batches: int) -> range:
    """Indices of the micro-batches that `worker` runs: contiguous, and as even as the numbers allow."""
    return range(worker * micro_batches // workers, (worker + 1) * micro_batches // workers)


def owner_of(micro_batch: int, workers: int, micro_batches: int) -> int:
    """The worker that runs this micro-batch."""
    return next(worker for worker in range(workers) if micro_batch in share_of(worker, workers, micro_batches))


class MicroBatches:
    """Global batches from `images_seen` on, without end. What they hold depends on (seed, images seen) alone, never on who asks."""

    def __init__(
        self,
        cache: LatentCache,
        config: MARConfig,
        *,
        batch: int,
        micro_batch: int,
        flip: bool,
        seed: int,
        worker: int,
        workers: int,
        shuffle_window: int = 0,
        checks: tuple[int, int] | None = None,
    ) -> None:
        """`checks`: see LatentDataset; None: all workers share the comparison of the shards."""
        self.config, self.batch, self.micro_batch, self.flip, self.seed = config, batch, micro_batch, flip, seed
        self.share = share_of(worker, workers, batch // micro_batch)
        self.latents = LatentDataset(cache, seed, shuffle_window, checks or (worker, workers))
        self.seconds_waited = 0.0

    def from_images(self, images_seen: int) -> Iterator[GlobalBatch]:
        """Yields each worker's share; the next one is prepared on a thread meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="micro-batches") as ahead:
            upcoming = ahead.submit(self.prepare, images_seen)
            while True:
                began = perf_counter()
                ready = upcoming.result()
                self.seconds_waited += perf_counter() - began
                images_seen += self.batch
                upcoming = ahead.submit(self.prepare, images_seen)
                yield ready

    def prepare(self, images_seen: int) -> GlobalBatch:
        """This worker's share of the global batch that begins at `images_seen`."""
        config = self.config
        generator = stream(self.seed, images_seen, "mask ratio")
        ratio = draw_mask_ratio(generator, config.mask_ratio_mean, config.mask_ratio_std, config.mask_ratio_min)
        masked = masked_tokens(config.tokens, ratio)
        return GlobalBatch(images_seen, masked, [self._micro_batch(images_seen, index, masked) for index in self.share])

    def _micro_batch(self, images_seen: int, index: int, masked: int) -> MicroBatch:
        first, images = images_seen + index * self.micro_batch, self.micro_batch
        flipped = np.zeros(images, dtype=bool)
        if self.flip:
            flipped = (torch.rand(images, generator=stream(self.seed, images_seen, index, "flip")) < 0.5).numpy()
        moments, labels = self.latents.read(first, first + images, flipped)
        size, channels = self.config.latent_size, self.config.latent_channels
        noise = torch.randn(images, channels, size, size, generator=stream(self.seed, images_seen, index, "posterior"))
        draws, dropout_seed = micro_batch_draws(self.config, images, masked, seed=self.seed, images_seen=images_seen, micro_batch=index)
        return MicroBatch(moments, labels, noise, draws, dropout_seed)
