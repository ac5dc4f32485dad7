"""Stage *generate*: images for given labels from a checkpoint, through an actor pool of Ray Data."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.generation import samples
from pipelines.generation.completion import read_completion
from pipelines.generation.drawing import FILM, GIVEN, PICTURE, Drawing, plan_drawing, range_warning
from pipelines.generation.film import film_of, film_samples
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.worker import DrawingActor
from pipelines.images.grid import encoded, grid_samples, write_grid
from pipelines.runtime import storage
from pipelines.runtime.cluster.workers import worker_resources
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage

if TYPE_CHECKING:
    from ray.data import Dataset


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


def generate(tokenizer_path: str, train_path: str, generate: GenerateSettings, stage: Stage) -> dict[str, Any]:
    """Draw `generate.images` images, or those of `generate.samples`, into `generate.path`: `shards/`, `images/CLASS/….png`, `samples.png`.

    With `generate.image` and `generate.mask` each sample is that image with what the mask hides drawn anew (`given.png` shows what was
    kept); with `generate.film` there is `film.webp` too. Returns the summary. Goes on where shards are missing. Raises UserError as
    `plan_drawing` and `read_completion` do, before any work.
    """
    drawing = plan_drawing(generate.path, tokenizer_path, train_path, generate, stage, generate.labels, files=True)
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
        shown = film_samples(drawing, grid_samples(count, len(set(drawing.labels))))
        stage.say(f"drawing the first {shown} once more, for {film}")
        storage.write_bytes(film, film_of(drawing, shown))
        if storage.is_local(film):
            stage.artifact(film)
    return finished


def _draw_all(drawing: Drawing, count: int, identity: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The samples that are missing, the picture and the summary."""
    path = drawing.path
    if drawing.completion is not None:
        storage.write_bytes(storage.join(path, GIVEN), encoded(drawing.completion.shown()))
    seconds, drawn, left, done = 0.0, 0, 0, 0
    shown = grid_samples(count, len(set(drawing.labels)))
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
    write_grid(picture, np.concatenate(images), np.concatenate(labels))
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
