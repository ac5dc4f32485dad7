"""The batches of a training run: images in an order that depends on the seed alone, and the posterior's noise."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from mar_model.noise import stream
from mar_model.training.sample_order import SampleOrder
from pipelines.images.pixels import to_model
from pipelines.images.reading import DecodedImages
from pipelines.tokenizing.settings import TokenizerSettings


def batches(
    images: DecodedImages,
    settings: TokenizerSettings,
    latent: tuple[int, int, int],
    seed: int,
    images_seen: int,
    worker: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's share of each global batch from `images_seen` to the end of training: images (b, 3, H, W) and posterior noise
    (b, C, h, w), the next prepared on a thread meanwhile. Noise is drawn for the global batch, so that it depends on no worker."""
    order = SampleOrder(stream(seed, "tokenize", "order").initial_seed(), len(images.rows))
    share = slice(worker * settings.batch // workers, (worker + 1) * settings.batch // workers)

    def prepare(start: int) -> tuple[Tensor, Tensor]:
        rows = order.indices(start, start + settings.batch)[share]
        noise = torch.randn(settings.batch, *latent, generator=stream(seed, "tokenize", start))[share]
        return to_model(images.take(np.asarray(rows))[0]), noise

    starts = range(images_seen, settings.images, settings.batch)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
        upcoming = ahead.submit(prepare, starts[0]) if starts else None
        for index in range(len(starts)):
            assert upcoming is not None
            ready = upcoming.result()
            if index + 1 < len(starts):
                upcoming = ahead.submit(prepare, starts[index + 1])
            yield ready
