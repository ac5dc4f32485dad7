"""Samples as a Ray dataset: read from existing shards, else drawn by an actor pool."""

from typing import TYPE_CHECKING

from pipelines.generation import samples
from pipelines.generation.drawing import Drawing
from pipelines.generation.worker import DrawingActor
from pipelines.runtime.cluster.workers import worker_resources

if TYPE_CHECKING:
    from ray.data import Dataset


def draw(drawing: Drawing, images: int) -> "Dataset":
    """A Ray dataset of the first `images` samples in order, one block per shard.

    Columns: `index` (the sample's number), `label` (int64), `image` (uint8 H×W×3), `out_of_range` (share of its latents, float32),
    `seconds` (float32, time to draw the sample; 0 if it was read from a shard). Existing shards are read; the rest is drawn and written.
    """
    import ray.data

    existing = samples.shards_there(drawing.path)
    missing = samples.shards_to_draw(images, drawing.settings.batch, existing)
    shards = sorted([(start, stop, True) for start, stop in existing] + [(start, stop, False) for start, stop in missing])
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
