"""Which samples are drawn, from which checkpoint and tokenizer."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mar_model.checkpoints.checkpoint import config_of, weights_file
from mar_model.flops import generation_flops, tokenizer_flops
from mar_model.tokenizers import network_config
from pipelines.checkpoints.directory import newest_checkpoint, read_checkpoint
from pipelines.checkpoints.released import checkpoint_directory, with_tokenizer
from pipelines.generation import samples
from pipelines.generation.completion import Completion
from pipelines.generation.settings import GenerateSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import tokenizer_digest
from pipelines.tokenizing.stage import check_tokenizer_files, tokenizer_config

IMAGES, PICTURE, GIVEN, FILM = "images", "samples.png", "given.png", "film.webp"

HELD_SHARE = 1 / 16  # of a sample's latents at the bounds of the data's range; trained models stay below, untrained ones go above


@dataclass(frozen=True)
class Drawing:
    """Everything that decides which samples are drawn and where they go: what a drawing actor is given."""

    path: str  # the shards go below it
    checkpoint: str
    state: dict[str, Any]  # of the checkpoint
    tokenizer: str
    settings: GenerateSettings
    labels: list[int]  # sample i has the label labels[i mod len(labels)]
    seed: int
    cluster: ClusterSettings
    files: bool  # write `images/CLASS/….png` beside the shards
    samples: Sequence[int] = ()  # their numbers; none: 0, 1, 2, …
    completion: Completion | None = None

    def numbers(self, start: int, stop: int) -> list[int]:
        """The numbers of the samples at these places."""
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
        """Whether predicted clean tokens are kept in the range of the data, which an imported checkpoint does not know."""
        return self.settings.limit_x0 and self.state["latent_min"] is not None

    def left_range(self, shares: np.ndarray) -> int:
        """How many samples left the range of the data, by the share of latents of each that did, or were held at its bounds."""
        return int((shares > (HELD_SHARE if self.limited else 0.0)).sum())

    @property
    def identity(self) -> dict[str, Any]:
        """What the drawn images depend on, apart from the settings: the weights and the tokenizer."""
        weights = weights_file(self.state, self.settings.ema, self.settings.ema_decay)
        drawn = {"checkpoint": self.state["files"][weights], "tokenizer": self.state["tokenizer"]["digest"], "seed": self.seed}
        return drawn if self.completion is None else {**drawn, **self.completion.identity}

    def flops_per_image(self) -> int:
        """Floating-point operations of one sample: of the model with these settings, and of the tokenizer's decoder."""
        settings, config = self.settings, config_of(self.state)
        completion = self.completion
        filled = None if completion is None else int(completion.fill(config.latent_size // config.patch_size).sum())
        flops = generation_flops(
            config, 1, ar_steps=settings.ar_steps, diffusion_steps=settings.diffusion_steps, guided=settings.guidance != 1.0,
            diffusion_steps_end=settings.diffusion_steps_end or None, reuse_steps=settings.reuse_steps,
            guidance_interval=(settings.guidance_interval[0], settings.guidance_interval[1]), filled=filled,
        )  # fmt: skip
        tokenizer = network_config(tokenizer_config(self.tokenizer))
        return flops + (tokenizer_flops(tokenizer, self.state["image_size"]).decode if tokenizer else 0)

    def speed(self, drawn: int, seconds: float) -> dict[str, float]:
        """Figures of a summary, where something was drawn, in so many seconds of the actors."""
        if not drawn:
            return {}
        flops = self.flops_per_image()
        return {"seconds_per_image": seconds / drawn, "gflop_per_image": flops / 1e9, "tflops_per_actor": flops * drawn / seconds / 1e12}

    def folder(self, label: int) -> str:
        """The folder of a class's PNG files, so that they are an image source again."""
        names = self.state.get("class_names") or [f"{number:04d}" for number in range(self.state["model"]["classes"])]
        return storage.join(self.path, IMAGES, samples.folder_name(names[label]))


def plan_drawing(
    path: str,
    tokenizer: str,
    train_path: str,
    generate: GenerateSettings,
    stage: Stage,
    labels: Sequence[int | str] = (),
    files: bool = False,
) -> Drawing:
    """Find the checkpoint (`generate.checkpoint`, or the newest in `train_path`) and check it against the labels (none: every class in
    turn) and the tokenizer in directory `tokenizer`. Damaged checkpoints that are newer are named by `stage.say`. Samples are written to
    `path`, with `files` as PNG files too.

    Raises UserError where there is no checkpoint, the tokenizer is not the one it was trained with, or a label is no class.
    """
    checkpoint = checkpoint_directory(generate.checkpoint) or newest_checkpoint(train_path, stage.say)
    if checkpoint is None:
        raise UserError(f"train.path {train_path!r} holds no checkpoint", remedy="run `mar train`, or name one in generate.checkpoint")
    try:
        state = read_checkpoint(checkpoint)
        weights_file(state, generate.ema, generate.ema_decay)
    except ValueError as error:
        raise UserError(
            f"generate.checkpoint {checkpoint!r}: {error}", remedy="name a checkpoint, or none for the newest of train.path"
        ) from error
    state = with_tokenizer(state, tokenizer)
    found, expected = tokenizer_digest(tokenizer), state["tokenizer"]["digest"]
    if found != expected:
        check_tokenizer_files(tokenizer)  # the files may be damaged
        raise UserError(
            f"tokenizer.path {tokenizer!r} has the digest {found[:12]}…, checkpoint {checkpoint} was trained with {expected[:12]}… "
            f"(then at {state['tokenizer']['path']!r})",
            remedy="name that tokenizer",
        )
    classes = state["model"]["classes"]
    found_labels = [_label(label, state.get("class_names") or [], classes) for label in labels]
    drawing = Drawing(path, checkpoint, state, tokenizer, generate, found_labels or list(range(classes)), stage.seed, stage.cluster, files)
    if drawing.unconditional and generate.guidance != 1.0:
        raise UserError(
            f"generate.guidance is {generate.guidance}, but {checkpoint} was trained without labels (model.label_drop 1): there is no "
            "class to be guided to",
            remedy="set generate.guidance=1",
        )
    return drawing


def _label(label: int | str, names: list[str], classes: int) -> int:
    """The number of a class given by number or name."""
    if isinstance(label, int):
        if not 0 <= label < classes:
            raise UserError(f"generate.labels has {label}, the checkpoint's classes are 0 to {classes - 1}")
        return label
    if label not in names:
        near = difflib.get_close_matches(label, names, 1, 0.0)
        known = f"the checkpoint knows no such class; nearest: {near[0]!r}" if near else "the checkpoint's classes have numbers only"
        raise UserError(f"generate.labels has {label!r}, {known}")
    return names.index(label)


def range_warning(left: int, images: int, drawing: Drawing) -> str:
    """What to tell the person when `left` of the samples left the range of the data, or were held at its bounds."""
    remedy = "train longer, or lower generate.guidance or generate.temperature"
    if drawing.limited:
        found = f"{left} of {images} samples have more than a sixteenth of their latents at the bounds of the data's range (blotchy images)"
    else:
        found = f"{left} of {images} samples left the range of the data (black, white or noisy images)"
        remedy = remedy if drawing.state["latent_min"] is None else f"set generate.limit_x0=true, or {remedy}"
    return f"{found}: the denoiser is undertrained for these settings; {remedy}"
