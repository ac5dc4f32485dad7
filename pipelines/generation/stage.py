"""Stage *generate*: images for given labels from a checkpoint, through an actor pool of Ray Data."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mar_model.checkpoints.checkpoint import config_of, weights_file
from mar_model.flops import generation_flops, tokenizer_flops
from mar_model.tokenizers import kl_config
from pipelines.checkpoints.directory import in_terminal, newest_checkpoint, read_checkpoint
from pipelines.checkpoints.released import checkpoint_directory, with_tokenizer
from pipelines.generation import samples
from pipelines.generation.completion import Completion, read_completion
from pipelines.generation.film import film_of, film_samples
from pipelines.generation.worker import DrawingActor
from pipelines.runtime import storage
from pipelines.runtime.cluster.connection import ClusterSettings, worker_resources
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import identity, identity_of, operational
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.stage import TokenizerSettings, check_tokenizer_files, tokenizer_config, tokenizer_digest
from pipelines.training.stage import TrainSettings

if TYPE_CHECKING:
    from ray.data import Dataset

IMAGES, PICTURE, GIVEN, FILM = "images", "samples.png", "given.png", "film.webp"
HELD_SHARE = 1 / 16  # of a sample's latents at the bounds of the data's range; trained models stay below, untrained ones go above


@dataclass
class GenerateSettings:
    """Section `generate`. Sample i is a function of (seed, i) alone, whatever batch or worker draws it."""

    path: str = operational("runs/mar/samples", "directory of the samples: shards/, images/, samples.png")
    checkpoint: str = operational("", "checkpoint directory; empty: the newest of train.path")
    images: int = identity(64, "images to draw; sample i has the label labels[i mod len(labels)]")
    labels: list[int | str] = identity(help="class numbers or names, cycled through; empty: every class in turn", factory=list)
    samples: list[int] = identity(help="numbers of the samples to draw; empty: 0 … images − 1", factory=list)
    ar_steps: int = identity(64, "autoregressive steps")
    diffusion_steps: int = identity(100, "denoising steps a token")
    guidance: float = identity(3.0, "classifier-free guidance scale; 1 is off")
    guidance_schedule: Literal["linear", "constant"] = identity("linear", "linear (grows as the image fills) or constant")
    temperature: float = identity(1.0, "factor on the noise added at every denoising step")
    sampler: Literal["ancestral", "ddim"] = identity("ancestral", "ancestral (as published) or ddim")
    eta: float = identity(0.0, "noise of ddim: 0 none, 1 as much as the posterior has")
    limit_x0: bool = identity(True, "keep each predicted clean token inside the range seen in the cache (off: the published sampler)")
    diffusion_steps_end: int = identity(0, "fast: denoising steps at the last AR step, fewer and fewer from diffusion_steps on; 0: off")
    reuse_steps: int = identity(0, "fast: AR steps that reuse features after each complete one; 0: off")
    guidance_interval: list[float] = identity(
        help="fast: shares of the noise schedule (0 clean, 1 noise) between which guidance acts; [0, 1]: off", factory=lambda: [0.0, 1.0]
    )
    image: str = operational("", "complete this image: draw what the mask hides, keep the rest")
    mask: str = operational("", "of the image's size: white is drawn anew")
    keep_pixels: bool = identity(True, "completion: the image's own pixels where the mask is black (off: all as decoded)")
    ema: bool = identity(True, "draw with the moving average of the weights")
    ema_decay: float = identity(0.0, "with which, where train.ema_decays made several; 0: that of train.ema_decay")
    precision: Literal["auto", "bf16", "float32"] = identity(
        "auto", "matrix products: auto, bf16 or float32; sampler state is always float32"
    )
    compile: bool = identity(False, "torch.compile the model's blocks: minutes at first, then faster")
    batch: int = operational(64, "images a batch and a shard")
    actors: int = operational(1, "actors that hold the model")
    cuda_graph: bool = operational(False, "on a GPU: capture the denoiser's loop as CUDA graphs")
    film: bool = operational(False, "write film.webp, the picture as it forms")


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
        tokenizer = kl_config(tokenizer_config(self.tokenizer))
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
    path: str, labels: Sequence[int | str], tokenizer: TokenizerSettings, train: TrainSettings, generate: GenerateSettings, seed: int,
    cluster: ClusterSettings, files: bool, say: Callable[[str], None] = in_terminal,
) -> Drawing:  # fmt: skip
    """Find the checkpoint and check it against labels (empty: every class in turn) and tokenizer. `say` is called with a line for each
    damaged checkpoint that is newer than the one it finds.

    Raises UserError where there is no checkpoint, the tokenizer is not the one it was trained with, or a label is no class.
    """
    checkpoint = checkpoint_directory(generate.checkpoint) or newest_checkpoint(train.path, say)
    if checkpoint is None:
        raise UserError(f"train.path {train.path!r} holds no checkpoint; run `mar train`, or name one in generate.checkpoint")
    try:
        state = read_checkpoint(checkpoint)
        weights_file(state, generate.ema, generate.ema_decay)
    except ValueError as error:
        raise UserError(f"generate.checkpoint {checkpoint!r}: {error}; name a checkpoint, or none for the newest of train.path") from error
    state = with_tokenizer(state, tokenizer.path)
    found, expected = tokenizer_digest(tokenizer.path), state["tokenizer"]["digest"]
    if found != expected:
        check_tokenizer_files(tokenizer.path)  # the files may be damaged
        raise UserError(
            f"tokenizer.path {tokenizer.path!r} has the digest {found[:12]}…, checkpoint {checkpoint} was trained with {expected[:12]}… "
            f"(then at {state['tokenizer']['path']!r}); name that tokenizer"
        )
    classes = state["model"]["classes"]
    found_labels = [_label(label, state.get("class_names") or [], classes) for label in labels]
    drawing = Drawing(path, checkpoint, state, tokenizer.path, generate, found_labels or list(range(classes)), seed, cluster, files)
    if drawing.unconditional and generate.guidance != 1.0:
        raise UserError(
            f"generate.guidance is {generate.guidance}, but {checkpoint} was trained without labels (model.label_drop 1): there is no "
            "class to be guided to; set generate.guidance=1"
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


def draw(drawing: Drawing, images: int) -> "Dataset":
    """A Ray dataset of the first `images` samples in order, a block a shard.

    Columns: `index` (its number), `label` (int64), `image` (uint8 H×W×3), `out_of_range` (share of its latents, float32), `seconds`
    (float32, what drawing it took; 0 where its shard was read). Shards that are there are read, the others drawn and written.
    """
    import ray.data

    there = samples.shards_there(drawing.path)
    missing = samples.shards_to_draw(images, drawing.settings.batch, there)
    shards = sorted([(start, stop, True) for start, stop in there] + [(start, stop, False) for start, stop in missing])
    rows = [{"start": start, "stop": stop, "drawn": drawn} for start, stop, drawn in shards]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.execution_options.preserve_order = True
    return dataset.map_batches(
        DrawingActor,
        fn_constructor_args=(drawing,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(drawing.settings.actors, len(missing)))),
        **worker_resources(drawing.cluster),
    )


def range_warning(left: int, images: int, drawing: Drawing) -> str:
    """What to tell the person when `left` of the samples left the range of the data, or were held at its bounds."""
    remedy = "train longer, or lower generate.guidance or generate.temperature"
    if drawing.limited:
        found = f"{left} of {images} samples have more than a sixteenth of their latents at the bounds of the data's range (blotchy images)"
    else:
        found = f"{left} of {images} samples left the range of the data (black, white or noisy images)"
        remedy = remedy if drawing.state["latent_min"] is None else f"set generate.limit_x0=true, or {remedy}"
    return f"{found}: the denoiser is undertrained for these settings; {remedy}"


def generate(tokenizer: TokenizerSettings, train: TrainSettings, generate: GenerateSettings, seed: int, stage: Stage) -> dict[str, Any]:
    """Draw `generate.images` images, or those of `generate.samples`, into `generate.path`: `shards/`, `images/CLASS/….png`, `samples.png`.

    With `generate.image` and `generate.mask` each sample is that image with what the mask hides drawn anew (`given.png` shows what was
    kept); with `generate.film` there is `film.webp` too. Returns the summary. Goes on where shards are missing. Raises UserError as
    `plan_drawing` and `read_completion` do, before any work.
    """
    drawing = plan_drawing(generate.path, generate.labels, tokenizer, train, generate, seed, stage.cluster, files=True, say=stage.say)
    if generate.image or generate.mask:
        completion = read_completion(generate.image, generate.mask, generate.keep_pixels, drawing.state["image_size"])
        drawing = replace(drawing, completion=completion)
    drawing = replace(drawing, samples=generate.samples)
    count = len(generate.samples) or generate.images
    identity = {**identity_of(generate=generate), **drawing.identity}
    finished = stage.begin(generate.path, identity)
    if finished is None:
        finished = _draw_all(drawing, count, identity, stage)
    film = storage.join(generate.path, FILM)
    if generate.film and not storage.exists(film):
        shown = film_samples(drawing, samples.grid_samples(count, len(set(drawing.labels))))
        stage.say(f"drawing the first {shown} once more, for {film}")
        storage.write_bytes(film, film_of(drawing, shown))
        if storage.is_local(film):
            stage.artifact(film)
    return finished


def _draw_all(drawing: Drawing, count: int, identity: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The samples that are missing, the picture and the summary."""
    path = drawing.path
    if drawing.completion is not None:
        storage.write_bytes(storage.join(path, GIVEN), samples.encoded(drawing.completion.shown()))
    seconds, drawn, left, done = 0.0, 0, 0, 0
    shown = samples.grid_samples(count, len(set(drawing.labels)))
    images, labels = [], []
    with stage.progress(count) as bar:
        for block in draw(drawing, count).iter_batches(batch_size=None, batch_format="numpy"):
            done += len(block["index"])
            drawn += int((block["seconds"] > 0).sum())
            seconds += float(block["seconds"].sum())
            left += drawing.left_range(block["out_of_range"])
            images.append(block["image"][: max(0, shown - done + len(block["index"]))])
            labels.append(block["label"][: len(images[-1])])
            bar.update(done)
    picture = storage.join(path, PICTURE)
    samples.write_grid(picture, np.concatenate(images), np.concatenate(labels))
    if storage.is_local(picture):
        stage.artifact(picture)
    if left:
        stage.say(range_warning(left, count, drawing))
    return stage.complete(
        path,
        identity,
        {
            "images": count,
            "out_of_range": left,
            **drawing.speed(drawn, seconds),
            "checkpoint": drawing.checkpoint,
            "images_seen": drawing.state["images_seen"],
        },
    )
