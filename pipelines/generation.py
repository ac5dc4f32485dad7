"""Stage *generate*: images for given labels from a checkpoint, through an actor pool of Ray Data."""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mar_model.checkpoint import AVERAGE, WEIGHTS, load_model, read_state
from mar_model.generate import generate as sample_latents
from mar_model.noise import SampleNoise
from mar_model.tokenizers import load_tokenizer
from pipelines import samples, storage
from pipelines.checkpoints import newest_checkpoint
from pipelines.cluster import ClusterSettings, default_device, use_threads, worker_resources
from pipelines.errors import UserError
from pipelines.images import to_uint8
from pipelines.precision import autocast
from pipelines.released import checkpoint_directory, with_tokenizer
from pipelines.settings import identity, identity_of, operational
from pipelines.stage import Stage
from pipelines.tokenizing import TokenizerSettings, tokenizer_digest
from pipelines.training import TrainSettings

if TYPE_CHECKING:
    from ray.data import Dataset

IMAGES, PICTURE = "images", "samples.png"


@dataclass
class GenerateSettings:
    """Section `generate`. Sample i is a function of (seed, i) alone, whatever batch or worker draws it."""

    path: str = operational("runs/mar/samples", "directory of the samples: shards/, images/, samples.png")
    checkpoint: str = operational("", "checkpoint directory; empty: the newest of train.path")
    images: int = identity(64, "images to draw; sample i has the label labels[i mod len(labels)]")
    labels: list[int] = identity(help="class labels, cycled through; empty: every class in turn", factory=list)
    ar_steps: int = identity(64, "autoregressive steps")
    diffusion_steps: int = identity(100, "denoising steps a token")
    guidance: float = identity(3.0, "classifier-free guidance scale; 1 is off")
    guidance_schedule: Literal["linear", "constant"] = identity("linear", "linear (grows as the image fills) or constant")
    temperature: float = identity(1.0, "factor on the noise added at every denoising step")
    limit_x0: bool = identity(True, "keep each predicted clean token inside the range seen in the cache (off: the published sampler)")
    ema: bool = identity(True, "draw with the moving average of the weights")
    precision: Literal["auto", "bf16", "float32"] = identity(
        "auto", "matrix products: auto, bf16 or float32; sampler state is always float32"
    )
    batch: int = operational(64, "images a batch and a shard")
    actors: int = operational(1, "actors that hold the model")


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

    @property
    def identity(self) -> dict[str, Any]:
        """What the drawn images depend on, apart from the settings: the weights and the tokenizer."""
        weights = AVERAGE if self.settings.ema else WEIGHTS
        return {"checkpoint": self.state["files"][weights], "tokenizer": self.state["tokenizer"]["digest"], "seed": self.seed}

    def folder(self, label: int) -> str:
        """The folder of a class's PNG files, so that they are an image source again."""
        names = self.state.get("class_names") or [f"{number:04d}" for number in range(self.state["model"]["classes"])]
        return storage.join(self.path, IMAGES, names[label])


def plan_drawing(
    path: str, labels: list[int], tokenizer: TokenizerSettings, train: TrainSettings, generate: GenerateSettings, seed: int,
    cluster: ClusterSettings, files: bool,
) -> Drawing:  # fmt: skip
    """Find the checkpoint and check it against labels (empty: every class in turn) and tokenizer.

    Raises UserError where there is no checkpoint, the tokenizer is not the one it was trained with, or a label is no class.
    """
    checkpoint = checkpoint_directory(generate.checkpoint) or newest_checkpoint(train.path)
    if checkpoint is None:
        raise UserError(f"train.path {train.path!r} holds no checkpoint; run `mar train`, or name one in generate.checkpoint")
    try:
        state = read_state(storage.local_directory(checkpoint))
    except ValueError as error:
        raise UserError(f"generate.checkpoint {checkpoint!r}: {error}; name a checkpoint, or none for the newest of train.path") from error
    state = with_tokenizer(state, tokenizer.path)
    found, expected = tokenizer_digest(tokenizer.path), state["tokenizer"]["digest"]
    if found != expected:
        raise UserError(
            f"tokenizer.path {tokenizer.path!r} has the digest {found[:12]}…, checkpoint {checkpoint} was trained with {expected[:12]}… "
            f"(then at {state['tokenizer']['path']!r}); name that tokenizer"
        )
    classes = state["model"]["classes"]
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise UserError(f"generate.labels has {wrong[:5]}, the checkpoint's classes are 0 to {classes - 1}")
    return Drawing(path, checkpoint, state, tokenizer.path, generate, labels or list(range(classes)), seed, cluster, files)


def draw(drawing: Drawing, images: int) -> "Dataset":
    """A Ray dataset of samples 0 … images − 1 in order, a block a shard.

    Columns: `index`, `label` (int64), `image` (uint8 H×W×3), `out_of_range` (share of its latents, float32), `seconds` (float32,
    what drawing it took; 0 where its shard was read). Shards that are there are read, the others drawn and written.
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


class DrawingActor:
    """Holds the model and the tokenizer, and turns shards to draw into images; both are loaded when the first one comes."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing

    def __call__(self, shard: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        start, stop = int(shard["start"][0]), int(shard["stop"][0])
        began = time.monotonic()
        if shard["drawn"][0]:
            drawn, seconds = samples.read_samples(self.drawing.path, start, stop), 0.0
        else:
            drawn = self._draw(range(start, stop))
            seconds = (time.monotonic() - began) / len(drawn.labels)
            self._write(drawn)
        return {
            "index": np.arange(start, stop),
            "label": drawn.labels,
            "image": drawn.images,
            "out_of_range": drawn.out_of_range,
            "seconds": np.full(stop - start, seconds, np.float32),
        }

    @cached_property
    def _loaded(self) -> "LoadedModel":
        return LoadedModel(self.drawing)

    def _draw(self, indices: range) -> samples.Samples:
        labels = np.array([self.drawing.labels[index % len(self.drawing.labels)] for index in indices])
        images, out_of_range = self._loaded.images(labels, indices)
        return samples.Samples(indices.start, labels, images, out_of_range)

    def _write(self, drawn: samples.Samples) -> None:
        if self.drawing.files:  # before the shard: where that is, the files are
            for offset, (label, image) in enumerate(zip(drawn.labels, drawn.images, strict=True)):
                name = f"{samples.key(drawn.start + offset)}.png"
                storage.write_bytes(storage.join(self.drawing.folder(int(label)), name), samples.encoded(image))
        samples.write_samples(self.drawing.path, drawn)


class LoadedModel:
    """Model and tokenizer on their device."""

    def __init__(self, drawing: Drawing) -> None:
        use_threads(drawing.cluster)
        self.settings, self.seed, self.device = drawing.settings, drawing.seed, default_device()
        model, state = load_model(storage.local_directory(drawing.checkpoint), ema=drawing.settings.ema)
        self.model = model.to(self.device)
        self.tokenizer = load_tokenizer(storage.local_directory(drawing.tokenizer)).to(self.device)
        widest = torch.finfo(torch.float32).max / 4  # an imported checkpoint does not know the range of its data
        unknown = {"latent_min": [-widest] * model.config.latent_channels, "latent_max": [widest] * model.config.latent_channels}
        self.mean, self.std, low, high = (
            torch.tensor(unknown[name] if state[name] is None else state[name], dtype=torch.float32)
            for name in ("latent_mean", "latent_std", "latent_min", "latent_max")
        )
        self.range = (low - self.mean) / self.std, (high - self.mean) / self.std  # normalised, (C,) each

    @torch.inference_mode()
    def images(self, labels: np.ndarray, indices: range) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (N, H, W, 3), and of each image the share of latents that left the range of the data, float32 (N,)."""
        settings = self.settings
        with autocast(settings.precision, self.device):
            latents = sample_latents(
                self.model,
                torch.from_numpy(labels).to(self.device),
                SampleNoise(self.seed, indices),
                ar_steps=settings.ar_steps,
                diffusion_steps=settings.diffusion_steps,
                guidance=settings.guidance,
                guidance_schedule=settings.guidance_schedule,
                temperature=settings.temperature,
                x0_range=self.range if settings.limit_x0 else None,
            )
        latents = latents.float()
        shares = share_out_of_range(latents.cpu(), *self.range)
        mean, std = (one.view(1, -1, 1, 1).to(self.device) for one in (self.mean, self.std))
        return to_uint8(self.tokenizer.decode(latents * std + mean)), shares.numpy()


def share_out_of_range(latents: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Share of each sample's latents (N, C, h, w) that are not finite or further outside [low, high] (C,) than half its width: (N,).

    Posterior samples and honest generations stray a little from the range of the posterior means; an overflow goes far.
    """
    margin = (high - low) / 2
    low, high = (bound.view(1, -1, 1, 1) for bound in (low - margin, high + margin))
    inside = (latents >= low) & (latents <= high)  # false for NaN
    return 1.0 - inside.flatten(1).float().mean(dim=1)


def range_warning(left: int, images: int, settings: GenerateSettings) -> str:
    """What to tell the person when `left` of the samples left the range of the data."""
    remedy = "train longer, or lower generate.guidance or generate.temperature"
    if not settings.limit_x0:
        remedy = f"set generate.limit_x0=true, or {remedy}"
    return (
        f"{left} of {images} samples left the range of the data (black, white or noisy images): the denoiser is undertrained "
        f"for these settings; {remedy}"
    )


def generate(tokenizer: TokenizerSettings, train: TrainSettings, generate: GenerateSettings, seed: int, stage: Stage) -> dict[str, Any]:
    """Draw `generate.images` images into `generate.path`: `shards/`, `images/CLASS/….png`, `samples.png`. Returns the summary.

    Goes on where shards are missing. Raises UserError as `plan_drawing` does.
    """
    drawing = plan_drawing(generate.path, generate.labels, tokenizer, train, generate, seed, stage.cluster, files=True)
    identity = {**identity_of(generate=generate), **drawing.identity}
    finished = stage.begin(generate.path, identity)
    if finished is not None:
        return finished
    seconds, drawn, left, done = 0.0, 0, 0, 0
    shown = samples.grid_samples(generate.images, len(set(drawing.labels)))
    images, labels = [], []
    with stage.progress(generate.images) as bar:
        for block in draw(drawing, generate.images).iter_batches(batch_size=None, batch_format="numpy"):
            done += len(block["index"])
            drawn += int((block["seconds"] > 0).sum())
            seconds += float(block["seconds"].sum())
            left += int((block["out_of_range"] > 0).sum())
            images.append(block["image"][: max(0, shown - done + len(block["index"]))])
            labels.append(block["label"][: len(images[-1])])
            bar.update(done)
    picture = storage.join(generate.path, PICTURE)
    samples.write_grid(picture, np.concatenate(images), np.concatenate(labels))
    if storage.is_local(picture):
        stage.artifact(picture)
    if left:
        stage.say(range_warning(left, generate.images, generate))
    return stage.complete(
        generate.path,
        identity,
        {
            "images": generate.images,
            "out_of_range": left,
            "seconds_per_image": seconds / drawn if drawn else None,
            "checkpoint": drawing.checkpoint,
            "images_seen": drawing.state["images_seen"],
        },
    )
