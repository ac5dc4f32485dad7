"""Arguments of a drawing actor: which samples to draw, from which checkpoint and tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mar_model.checkpoints.checkpoint import config_of, weights_file
from mar_model.flops import generation_flops, tokenizer_flops
from mar_model.sampling.options import GenerationOptions
from mar_model.tokenizers import network_config
from pipelines.generation import samples
from pipelines.generation.completion import Completion
from pipelines.generation.settings import GenerateSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.tokenizing.directory import tokenizer_config

IMAGES, PICTURE, GIVEN, FILM = "images", "samples.png", "given.png", "film.webp"
FILM_PIXELS = 2**20  # of all samples in an animation together

HELD_SHARE = 1 / 16  # of a sample's latents at the bounds of the data's range; trained models stay below, untrained ones exceed it


@dataclass(frozen=True)
class Drawing:
    """Arguments of a drawing actor: all that determines the samples, and where they are written."""

    path: str  # directory of the samples
    checkpoint: str
    state: dict[str, Any]  # of the checkpoint
    tokenizer: str
    settings: GenerateSettings
    labels: list[int]  # sample i has the label labels[i mod len(labels)]
    seed: int
    cluster: ClusterSettings
    files: bool  # write PNG files `images/CLASS/….png` too
    samples: Sequence[int] = ()  # numbers of the samples; empty: 0, 1, 2, …
    completion: Completion | None = None

    def numbers(self, start: int, stop: int) -> list[int]:
        """The numbers of the samples with indices start … stop − 1."""
        return list(self.samples[start:stop] if self.samples else range(start, stop))

    def labels_of(self, numbers: Sequence[int]) -> np.ndarray:
        """The labels of the samples with these numbers, (N,) int64."""
        return np.array([self.labels[number % len(self.labels)] for number in numbers], np.int64)

    @property
    def unconditional(self) -> bool:
        """Whether the model was trained without labels."""
        return bool(self.state["model"].get("label_drop") == 1.0)

    @property
    def limited(self) -> bool:
        """Whether predicted clean tokens are clamped to the range of the data, which is unknown for an imported checkpoint."""
        return self.settings.limit_x0 and self.state["latent_min"] is not None

    def left_range(self, shares: np.ndarray) -> int:
        """How many samples left the range of the data or were clamped to its bounds, by the share of such latents in each sample."""
        return int((shares > (HELD_SHARE if self.limited else 0.0)).sum())

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the identity that is not in the settings: digests of the weights and the tokenizer, the seed, and the completion."""
        weights = weights_file(self.state, self.settings.ema, self.settings.ema_decay)
        drawn = {"checkpoint": self.state["files"][weights], "tokenizer": self.state["tokenizer"]["digest"], "seed": self.seed}
        return drawn if self.completion is None else {**drawn, **self.completion.identity}

    def options(self, latent_range: tuple[Tensor, Tensor] | None = None) -> GenerationOptions:
        """The model's options. Predicted clean tokens are clamped to `latent_range` if `limited`."""
        names = (
            "ar_steps", "diffusion_steps", "guidance", "guidance_schedule", "temperature", "sampler", "eta", "reuse_steps",
        )  # fmt: skip
        low, high = self.settings.guidance_interval
        return GenerationOptions(
            **{name: getattr(self.settings, name) for name in names},
            diffusion_steps_end=self.settings.diffusion_steps_end or None,
            guidance_interval=(low, high),
            x0_range=latent_range if self.limited else None,
        )

    def flops_per_image(self) -> int:
        """Floating-point operations per sample, of the model with these settings and of the tokenizer's decoder."""
        config, completion = config_of(self.state), self.completion
        filled = None if completion is None else int(completion.fill(config.latent_size // config.patch_size).sum())
        flops = generation_flops(config, 1, self.options(), filled)
        tokenizer = network_config(tokenizer_config(self.tokenizer))
        return flops + (tokenizer_flops(tokenizer, self.state["image_size"]).decode if tokenizer else 0)

    def speed(self, drawn: int, seconds: float) -> dict[str, float]:
        """Speed metrics for the summary, from the number of drawn samples and the actors' seconds; empty if nothing was drawn."""
        if not drawn:
            return {}
        flops = self.flops_per_image()
        return {"seconds_per_image": seconds / drawn, "gflop_per_image": flops / 1e9, "tflops_per_actor": flops * drawn / seconds / 1e12}

    def filmed(self, shown: int) -> int:
        """Number of samples in an animation: at most `shown`, one batch, and FILM_PIXELS."""
        return max(1, min(shown, self.settings.batch, FILM_PIXELS // self.state["image_size"] ** 2))

    def folder(self, label: int) -> str:
        """The folder of a class's PNG files; together the folders are an image source."""
        names = self.state.get("class_names") or [f"{number:04d}" for number in range(self.state["model"]["classes"])]
        return storage.join(self.path, IMAGES, samples.folder_name(names[label]))


def range_warning(left: int, images: int, drawing: Drawing) -> str:
    """The warning for the user when `left` samples left the range of the data, or were clamped to its bounds."""
    remedy = "train longer, or lower generate.guidance or generate.temperature"
    if drawing.limited:
        found = f"{left} of {images} samples have more than a sixteenth of their latents at the bounds of the data's range (blotchy images)"
    else:
        found = f"{left} of {images} samples left the range of the data (black, white or noisy images)"
        remedy = remedy if drawing.state["latent_min"] is None else f"set generate.limit_x0=true, or {remedy}"
    return f"{found}: the denoiser is undertrained for these settings; {remedy}"
