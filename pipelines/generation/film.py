"""The picture as it forms: an animation of the first samples over the autoregressive steps."""

import io

import numpy as np
from PIL import Image

from pipelines.generation.drawing import Drawing
from pipelines.generation.worker import LoadedModel
from pipelines.images.grid import grid
from pipelines.runtime.cluster.workers import worker_resources

PIXELS = 2**20  # of all images together
MILLISECONDS = 4000  # of the forming; then the finished picture stands as long as LAST
SHORTEST, LONGEST, LAST = 40, 400, 2000


def film_samples(drawing: Drawing, shown: int) -> int:
    """How many of the `shown` samples the film has: as many as one batch and PIXELS hold."""
    return max(1, min(shown, drawing.settings.batch, PIXELS // drawing.state["image_size"] ** 2))


def film_of(drawing: Drawing, count: int) -> bytes:
    """Draw the first `count` samples in a Ray task: an animated WebP of their grid before the first and after each AR step."""
    import ray

    task = ray.remote(**worker_resources(drawing.cluster))(_film)
    data: bytes = ray.get(task.remote(drawing, count))
    return data


def _film(drawing: Drawing, count: int) -> bytes:
    numbers = drawing.numbers(0, count)
    labels = drawing.labels_of(numbers)
    frames: list[Image.Image] = []

    def show(images: np.ndarray) -> None:
        frames.append(Image.fromarray(grid(images, labels)))

    LoadedModel(drawing).film(labels, numbers, show)
    return animation(frames)


def animation(frames: list[Image.Image]) -> bytes:
    """Frames as a WebP that plays for ever."""
    each = min(max(MILLISECONDS // len(frames), SHORTEST), LONGEST)
    buffer = io.BytesIO()
    durations = [each] * (len(frames) - 1) + [LAST]
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=80)
    return buffer.getvalue()
