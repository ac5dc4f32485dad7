"""The causes of an evaluation's numbers, as parts of its record: metrics by class, and the nearest training images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipelines.evaluation.causes.by_class import FILE, ByClass, by_class
from pipelines.evaluation.causes.memorisation import PICTURE, SHARE, memorisation, show_neighbours, training_images
from pipelines.evaluation.causes.pictures import write_rows
from pipelines.evaluation.image_sets.readers import Reader
from pipelines.evaluation.reference_file import Reference
from pipelines.evaluation.references.made import source_statistics, statistics_path
from pipelines.evaluation.scoring.feature_shards import KeptFeatures
from pipelines.evaluation.scoring.measure import HERE
from pipelines.evaluation.scoring.tasks import Tasks
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.grid import GRID_COLUMNS
from pipelines.images.listing import Images
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage

CLASSES_PICTURE = "classes.png"
TRAINING_IMAGES = "training_images"  # in the summary: `evaluate.training_images` of the finished evaluation


@dataclass(frozen=True)
class Evaluated:
    """Samples whose metrics are known. `inside`: see `Measured`. `shown`: samples in the grid, from the first."""

    kept: KeptFeatures
    inside: np.ndarray | None
    reference: Reference
    class_names: Sequence[str]
    reader: Reader
    shown: int
    square: bool = True  # as training images are


@dataclass
class Causes:
    """Parts of the summary and of the record."""

    figures: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def find_causes(one: Evaluated, images: Images, evaluate: EvaluateSettings, digest: str, stage: Stage, shared: str = "") -> Causes:
    """Write `by_class.csv`, `classes.png` and `neighbours.png` to `evaluate.path`, those that the samples allow. images: the source whose
    train part the samples are compared with. shared: where the training images' features are kept, if not in `evaluate.path`.

    What can't be computed is left out, and the reason is logged and recorded."""
    causes = Causes({TRAINING_IMAGES: evaluate.training_images})
    total = sum(stop - start for start, stop in one.kept.ranges)
    try:
        table = by_class(one.kept, one.inside, one.reference, one.class_names, Tasks(total <= HERE))
    except ValueError as error:
        causes.record["by_class"] = {"left_out": str(error)}
    else:
        table.save(storage.join(evaluate.path, FILE))
        shown = _show_classes(storage.join(evaluate.path, CLASSES_PICTURE), table, one)
        causes.record["by_class"] = {**table.record(), **({"picture": CLASSES_PICTURE} if shown else {})}
    if evaluate.training_images:
        _compare_with_training(one, images, replace(evaluate, path=shared or evaluate.path), digest, stage, evaluate.path, causes)
    return causes


def _show_classes(path: str, table: ByClass, one: Evaluated) -> bool:
    """A row of samples for each of the best and the worst classes."""
    best, worst = table.ends()
    if not best:
        return False
    numbers = one.kept.numbers()
    rows = [np.sort(numbers["index"][numbers["label"] == table.labels[row]])[:GRID_COLUMNS] for row in (*best, *worst)]
    write_rows(path, [list(one.reader.take(row)) for row in rows])
    return True


def _compare_with_training(
    one: Evaluated, images: Images, evaluate: EvaluateSettings, digest: str, stage: Stage, path: str, causes: Causes
) -> None:
    try:
        if not one.square:
            raise UserError("the samples are not square, and training images are cropped to squares")
        source = training_images(images, evaluate.training_images)
        source_statistics([source], evaluate, digest, stage)  # computed once, and kept as a reference's are
        training = Reference.load(statistics_path(evaluate, source, digest), evaluate.features)
        found, index, record = memorisation(one.kept, one.reference, training, source)
    except storage.UnwritableError:
        raise
    except UserError as error:
        stage.say(f"samples are not compared with training images: {error.text}")
        causes.record["memorisation"] = {"left_out": error.text}
        return
    order = np.argsort(one.kept.numbers()["index"])[: one.shown]
    rows = show_neighbours(storage.join(path, PICTURE), order, one.kept, found, (source, index), one.reader)
    causes.record["memorisation"] = {**record, "train_part": len(images.listing.train()), "picture": PICTURE, "nearest": rows}
    causes.figures |= {SHARE: record["share"], f"{SHARE}_standard_error": record["standard_error"]}
    if "reference" in record:
        causes.figures[f"{SHARE}_of_reference"] = record["reference"]
