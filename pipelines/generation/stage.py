"""Stage *generate*: draws images for given labels from a checkpoint, with an actor pool of Ray Data."""

from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.generation.completion import read_completion
from pipelines.generation.dataset import draw
from pipelines.generation.drawing import FILM, GIVEN, PICTURE, Drawing, range_warning
from pipelines.generation.planning import plan_drawing
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.worker import draw_film
from pipelines.images.grid import encoded, grid_samples, write_grid
from pipelines.runtime import storage
from pipelines.runtime.cluster.workers import worker_resources
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage


def generate(tokenizer_path: str, train_path: str, generate: GenerateSettings, stage: Stage) -> dict[str, Any]:
    """Draw `generate.images` images, or those of `generate.samples`, into `generate.path`: `shards/`, `images/CLASS/….png`, `samples.png`.

    With `generate.image` and `generate.mask` each sample is that image with the masked area drawn (`given.png` shows the kept area); with
    `generate.film` also writes `film.webp`. Returns the summary. Existing shards are kept. Raises UserError as `plan_drawing` and
    `read_completion` do, before any work.
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
        import ray

        shown = drawing.filmed(grid_samples(count, len(set(drawing.labels))))
        stage.say(f"drawing the first {shown} samples again for {film}")
        task = ray.remote(**worker_resources(drawing.cluster))(draw_film)
        storage.write_bytes(film, ray.get(task.remote(drawing, shown)))
        stage.artifact(film)
    return finished


def _draw_all(drawing: Drawing, count: int, identity: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Draw the missing samples, and write the sample grid and the summary."""
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
