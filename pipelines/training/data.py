"""Input of a training worker: its share of the micro-batches of each global batch, prepared one step ahead."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mar_model.config import MARConfig
from mar_model.mar import TrainingDraws
from mar_model.masking import draw_mask_ratio, masked_tokens
from mar_model.noise import stream, to_device
from mar_model.tokenizers import sample_posterior
from mar_model.training.recipe import micro_batch_draws
from mar_model.training.sample_order import Order, SampleOrder, WindowedOrder
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.latent_format import Manifest
from pipelines.runtime.errors import UserError

AHEAD = 2  # batches prepared in advance

BLOCK = 8192  # positions per call of the order: a few positions cost nearly as much as many


class MicroBatch(NamedTuple):
    """Input of one forward pass: B images as posterior moments, and all random draws."""

    moments: Tensor  # (B, 2C, H, W) in the cache's dtype
    labels: Tensor  # (B,) int64
    posterior_noise: Tensor  # (B, C, H, W) float32
    draws: TrainingDraws
    dropout_seed: int


class GlobalBatch(NamedTuple):
    """One worker's share of the global batch that begins at `images_seen`."""

    images_seen: int
    masked: int  # masked tokens per image, the same for the whole global batch
    micro_batches: list[MicroBatch]


def share_of(worker: int, workers: int, micro_batches: int) -> range:
    """Indices of the micro-batches that `worker` runs: a contiguous range, distributed as evenly as possible."""
    return range(worker * micro_batches // workers, (worker + 1) * micro_batches // workers)


def flips(seed: int, images_seen: int, micro_batch: int, images: int) -> np.ndarray:
    """Which images of a micro-batch are mirrored, bool (N,). `micro_batch`: its index in the global batch that begins at `images_seen`."""
    return (torch.rand(images, generator=stream(seed, images_seen, micro_batch, "flip")) < 0.5).numpy()


def owner_of(micro_batch: int, workers: int, micro_batches: int) -> int:
    """The worker that runs this micro-batch."""
    return next(worker for worker in range(workers) if micro_batch in share_of(worker, workers, micro_batches))


@dataclass
class MicroBatches:
    """An endless sequence of global batches. Their content depends only on (seed, images seen), not on the worker."""

    cache: LatentCache
    config: MARConfig
    batch: int
    micro_batch: int
    flip: bool
    seed: int
    worker: int
    workers: int
    shuffle_window: int = 0
    checks: tuple[int, int] | None = None  # see LatentDataset; None: all workers share the verification of the shards

    def __post_init__(self) -> None:
        self.share = share_of(self.worker, self.workers, self.batch // self.micro_batch)
        self.latents = LatentDataset(self.cache, self.seed, self.shuffle_window, self.checks or (self.worker, self.workers))
        self.seconds_waited = 0.0

    def from_images(self, images_seen: int) -> Iterator[GlobalBatch]:
        """Yields this worker's share of each global batch; the next is prepared on a thread in the meantime."""
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
        flipped = flips(self.seed, images_seen, index, images) if self.flip else np.zeros(images, bool)
        moments, labels = self.latents.read(first, first + images, flipped)
        size, channels = self.config.latent_size, self.config.latent_channels
        noise = torch.randn(images, channels, size, size, generator=stream(self.seed, images_seen, index, "posterior"))
        draws, dropout_seed = micro_batch_draws(self.config, images, masked, seed=self.seed, images_seen=images_seen, micro_batch=index)
        return MicroBatch(moments, labels, noise, draws, dropout_seed)


class LatentBatch(NamedTuple):
    """B records as posterior moments."""

    position: int  # images seen before this global batch
    moments: Tensor  # (B, 2C, H, W) in the cache's dtype
    labels: Tensor  # (B,) int64


class LatentDataset:
    """A latent cache in training order. Its state is a single integer, the position: images seen.

    The SHA-256 of each shard is verified once, on a background thread: `read` raises UserError after a damaged shard was found, and
    `settle_checks` waits until all shards that were read from are verified."""

    def __init__(self, cache: LatentCache, seed: int, window: int = 0, checks: tuple[int, int] = (0, 1)) -> None:
        """`window`: number of shards shuffled together; 0: all. `checks`: (index, count) of this process among the processes that read the
        same files in the same order and share their verification. Raises UserError if shards are fetched to a local disk that is too small
        for that order."""
        self.cache, self.seed, self.checks = cache, seed, checks
        cache.checked_beside()
        shard_rows = [shard["rows"] for shard in cache.manifest.shards]
        self.order: Order = WindowedOrder(seed, shard_rows, window) if window else SampleOrder(seed, len(cache))
        self.pin_memory = torch.cuda.is_available()
        self._block = lru_cache(maxsize=4)(lambda number: self.order.indices(number * BLOCK, (number + 1) * BLOCK))
        needed = min(window + 1, len(shard_rows)) if window else len(shard_rows)
        if cache.local is not None and cache.local.capacity < needed:
            raise UserError(
                f"cache.local_gb is {cache.local.limit / 1e9:g}, which fits {cache.local.capacity} of the {len(shard_rows)} shards of "
                f"{cache.path!r}, but train.shuffle_window={window} reads from {needed} at a time",
                remedy=f"raise cache.local_gb, or set a train.shuffle_window from 1 to {cache.local.capacity - 1}",
            )

    def read(self, start: int, stop: int, flipped: np.ndarray) -> tuple[Tensor, Tensor]:
        """The records at positions start … stop − 1, the mirror image if `flipped` (N,): moments (N, 2C, H, W), labels (N,)."""
        self._prepare_shards(start)
        dtype = getattr(torch, self.cache.manifest.dtype)
        moments = torch.empty(stop - start, *self.cache.moments_shape, dtype=dtype, pin_memory=self.pin_memory)
        first, last = start // BLOCK, max(stop - 1, start) // BLOCK
        rows = self._block(first) if first == last else np.concatenate([self._block(number) for number in range(first, last + 1)])
        rows = rows[start - first * BLOCK : stop - first * BLOCK]
        _, labels = self.cache.take(rows, flipped, out=moments.numpy())
        found = torch.from_numpy(labels)
        return moments, found.pin_memory() if self.pin_memory else found

    def settle_checks(self) -> None:
        """Wait until this process's share of the shards read so far is verified. Raises UserError if a shard is damaged."""
        self.cache.checks.settle()

    def _prepare_shards(self, position: int) -> None:
        """Start fetching and verifying the shards that are read at this position and soon after it."""
        checks, (mine, count) = self.cache.checks, self.checks
        if isinstance(self.order, WindowedOrder):
            numbers = self.order.shards_from(position, 2 * self.order.window)
            if self.cache.local is not None:
                self.cache.local.ahead(numbers)
                numbers = numbers[: self.cache.local.capacity - 1]
            checks.begin(number for number in numbers if number % count == mine)
        elif not checks.begun:
            checks.begin(range(mine, len(self.cache.manifest.shards), count))
        checks.raise_found()

    def batches(
        self, position: int, batch: int, *, micro_batch: int = 0, flip: bool = True, worker: int = 0, workers: int = 1
    ) -> Iterator[LatentBatch]:
        """This worker's share of each global batch of `batch` records, from `position`, without end. With `flip` the same images are
        mirrored as in a training with this seed, `train.batch` and `train.micro_batch` (0: the whole batch). For any number of workers the
        shares add up to the same global batches.

        Raises ValueError unless `micro_batch` divides `batch`.
        """
        images, unit = micro_batch or batch, micro_batch or 1
        if batch % images:
            raise ValueError(f"batch is {batch}, expected a multiple of micro_batch, which is {images}")
        share = share_of(worker, workers, batch // unit)
        start, stop = share.start * unit, share.stop * unit

        def prepare(first: int) -> LatentBatch:
            mirrored = [flips(self.seed, first, index, images) if flip else np.zeros(images, bool) for index in range(batch // images)]
            return LatentBatch(first, *self.read(first + start, first + stop, np.concatenate(mirrored)[start:stop]))

        with ThreadPoolExecutor(1, thread_name_prefix="latents") as thread:
            upcoming = deque(thread.submit(prepare, position + number * batch) for number in range(AHEAD))
            while True:
                ready = upcoming.popleft().result()
                position = ready.position
                upcoming.append(thread.submit(prepare, position + AHEAD * batch))
                yield ready


class Normalization:
    """Moments (B, 2C, H, W) and noise → normalized latents (B, C, H, W) float32 on the training device."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(manifest.latent_mean, device=device)[None, :, None, None]
        self.std = torch.tensor(manifest.latent_std, device=device)[None, :, None, None]

    def __call__(self, moments: Tensor, noise: Tensor) -> Tensor:
        latents = sample_posterior(to_device(moments, self.device).float(), to_device(noise, self.device))
        return (latents - self.mean) / self.std
