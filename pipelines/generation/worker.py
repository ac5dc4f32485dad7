"""The drawing actor: turns labels and sample numbers into images."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mar_model.checkpoints.checkpoint import load_model
from mar_model.noise import SampleNoise
from mar_model.sampling.generate import generate
from mar_model.sampling.options import Completion
from mar_model.sampling.token_sampler import TokenSampler
from mar_model.tokenizers import load_tokenizer
from pipelines.generation import samples
from pipelines.generation.drawing import Drawing
from pipelines.generation.film import animation
from pipelines.images.grid import encoded, grid
from pipelines.images.pixels import to_uint8
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import autocast
from pipelines.runtime.cluster.workers import default_device, use_threads

UNKNOWN_RANGE = 10.0  # standard deviations, used as the data's range if the checkpoint does not contain it
GREY = 128  # of areas that are not drawn yet


class DrawingActor:
    """Draws or reads shards of images; loads the model and the tokenizer on the first shard to draw."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing

    def __call__(self, shard: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        start, stop = int(shard["start"][0]), int(shard["stop"][0])
        began = time.monotonic()
        if shard["drawn"][0]:
            drawn, seconds = samples.read_samples(self.drawing.path, start, stop), 0.0
        else:
            drawn = self._draw(start, stop)
            seconds = (time.monotonic() - began) / len(drawn.labels)
            self._write(drawn)
        return {
            "index": drawn.numbers,
            "label": drawn.labels,
            "image": drawn.images,
            "out_of_range": drawn.out_of_range,
            "seconds": np.full(stop - start, seconds, np.float32),
        }

    @cached_property
    def _loaded(self) -> "LoadedModel":
        return LoadedModel(self.drawing)

    def _draw(self, start: int, stop: int) -> samples.Samples:
        numbers = self.drawing.numbers(start, stop)
        labels = self.drawing.labels_of(numbers)
        images, out_of_range = self._loaded.images(labels, numbers)
        return samples.Samples(start, np.array(numbers), labels, images, out_of_range)

    def _write(self, drawn: samples.Samples) -> None:
        if self.drawing.files:  # before the shard: an existing shard implies its files
            for number, label, image in zip(drawn.numbers, drawn.labels, drawn.images, strict=True):
                name = f"{samples.key(int(number))}.png"
                storage.write_bytes(storage.join(self.drawing.folder(int(label)), name), encoded(image))
        samples.write_samples(self.drawing.path, drawn)


class LoadedModel:
    """A model and its tokenizer on their device."""

    def __init__(self, drawing: Drawing) -> None:
        use_threads(drawing.cluster)
        self.drawing, self.settings, self.device = drawing, drawing.settings, default_device()
        settings = drawing.settings
        model, state = load_model(storage.local_directory(drawing.checkpoint), ema=settings.ema, decay=settings.ema_decay)
        self.model = model.to(self.device)
        self.tokenizer = load_tokenizer(storage.local_directory(drawing.tokenizer)).to(self.device)
        self.mean, self.std = (torch.tensor(state[name], dtype=torch.float32) for name in ("latent_mean", "latent_std"))
        if state["latent_min"] is None:
            self.range = torch.full_like(self.mean, -UNKNOWN_RANGE), torch.full_like(self.mean, UNKNOWN_RANGE)
        else:  # normalised, (C,) each
            low, high = (torch.tensor(state[name], dtype=torch.float32) for name in ("latent_min", "latent_max"))
            self.range = (low - self.mean) / self.std, (high - self.mean) / self.std
        with autocast(self.settings.precision, self.device):
            bf16 = self.settings.cuda_graph and torch.is_autocast_enabled(self.device.type)
        if self.settings.compile:
            self.model.compile_blocks()
        self.token_sampler = TokenSampler(
            self.model.diffloss.net, dtype=torch.bfloat16 if bf16 else None, cuda_graph=self.settings.cuda_graph
        )

    @torch.inference_mode()
    def images(self, labels: np.ndarray, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (N, H, W, 3), and for each image the share of latents that left the range of the data, float32 (N,)."""
        latents = self._latents(labels, numbers)
        share = share_at_bounds if self.drawing.limited else share_out_of_range
        return self._restored(self._decoded(latents)), share(latents.cpu(), *self.range).numpy()

    @torch.inference_mode()
    def film(self, labels: np.ndarray, numbers: Sequence[int], show: Callable[[np.ndarray], None]) -> None:
        """Call `show` with the images (N, H, W, 3) before the first and after each AR step, grey where nothing is drawn yet."""
        config = self.model.config

        def show_step(step: int, latents: Tensor) -> None:
            empty = F.max_pool2d(latents.abs().amax(dim=1), config.patch_size) == 0  # (N, h, w), by token
            images = self._decoded(latents)
            pixels = images.shape[1] // empty.shape[1]
            images[empty.cpu().numpy().repeat(pixels, axis=1).repeat(pixels, axis=2)] = GREY
            show(self._restored(images))

        start = torch.zeros(len(numbers), config.latent_channels, config.latent_size, config.latent_size, device=self.device)
        if self._completion is not None:
            known, fill = self._completion
            hidden = fill.repeat_interleave(config.patch_size, dim=1).repeat_interleave(config.patch_size, dim=2)
            start += known.masked_fill(hidden[:, None].to(self.device), 0.0)
        show_step(-1, start)
        self._latents(labels, numbers, show_step)

    def _latents(self, labels: np.ndarray, numbers: Sequence[int], after_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Normalised latents (N, C, h, w) float32."""
        completion = None
        if self._completion is not None:
            completion = Completion(*(part.expand(len(numbers), *part.shape[1:]) for part in self._completion))
        with autocast(self.settings.precision, self.device):
            return generate(
                self.model,
                None if self.drawing.unconditional else torch.from_numpy(labels),
                SampleNoise(self.drawing.seed, numbers, self.device),
                self.drawing.options(self.range),
                completion=completion,
                token_sampler=self.token_sampler,
                after_step=after_step,
            )

    @cached_property
    def _completion(self) -> tuple[Tensor, Tensor] | None:
        """Normalised known latents (1, C, h, w), and the tokens to fill (1, h, w)."""
        completion, config = self.drawing.completion, self.model.config
        if completion is None:
            return None
        mean, std = self._statistics
        known = (completion.known(self.tokenizer, self.device).float() - mean) / std
        return known, completion.fill(config.latent_size // config.patch_size)[None]

    @property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (1, C, 1, 1)."""
        mean, std = (values.view(1, -1, 1, 1).to(self.device) for values in (self.mean, self.std))
        return mean, std

    def _decoded(self, latents: Tensor) -> np.ndarray:
        mean, std = self._statistics
        return to_uint8(self.tokenizer.decode(latents * std + mean))

    def _restored(self, images: np.ndarray) -> np.ndarray:
        return images if self.drawing.completion is None else self.drawing.completion.restored(images)


def share_out_of_range(latents: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Share of each sample's latents (N, C, h, w) that are not finite, or outside [low, high] (C,) by more than half its width: (N,).

    Posterior samples and regular generations exceed the range of the posterior means only slightly; an overflow exceeds it by far.
    """
    margin = (high - low) / 2
    low, high = (bound.view(1, -1, 1, 1) for bound in (low - margin, high + margin))
    inside = (latents >= low) & (latents <= high)  # false for NaN
    return 1.0 - inside.flatten(1).float().mean(dim=1)


def share_at_bounds(latents: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Share of each sample's latents (N, C, h, w) that are not finite or were clamped to a bound of [low, high] (C,): (N,)."""
    low, high = (bound.view(1, -1, 1, 1) for bound in (low, high))
    inside = (latents > low) & (latents < high)
    return 1.0 - inside.flatten(1).float().mean(dim=1)


def draw_film(drawing: Drawing, count: int) -> bytes:
    """Draw the first `count` samples; returns an animated WebP of their grid before the first and after each autoregressive step."""
    numbers = drawing.numbers(0, count)
    labels = drawing.labels_of(numbers)
    frames: list[Image.Image] = []

    def show(images: np.ndarray) -> None:
        frames.append(Image.fromarray(grid(images, labels)))

    LoadedModel(drawing).film(labels, numbers, show)
    return animation(frames)
