"""Whether samples are copies: their nearest training images, and how close these are."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipelines.evaluation.causes.nearest import Nearest, TrainingImages
from pipelines.evaluation.causes.pictures import write_rows
from pipelines.evaluation.image_sets.readers import Reader
from pipelines.evaluation.image_sets.sets import RealImages
from pipelines.evaluation.image_sets.turns import in_turn
from pipelines.evaluation.reference_file import Reference
from pipelines.evaluation.scoring.feature_shards import KeptFeatures
from pipelines.evaluation.scoring.measure import HERE, share_error
from pipelines.evaluation.scoring.tasks import Tasks
from pipelines.images.listing import Images
from pipelines.images.reading import DECODERS, decode_row
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import null_for_nan

PICTURE = "neighbours.png"
SHARE = "near_training_share"
DEFINITION = (
    "share of samples that lie nearer to a training image than this lies to any other of the training images used, by the distance of "
    "pooled features; `reference`: the same share of the reference's images"
)
MOST_COPIES = 0.01  # of the reference's images among the training images used, beyond which it says nothing


def training_images(images: Images, count: int) -> RealImages:
    """`count` images of the train part (all if it has fewer), every class in turn. Raises UserError where images.source can't be listed."""
    if not images.settings.source:
        raise UserError("images.source is not set")
    listing = images.listing
    return RealImages(images.settings, in_turn(listing.train(), count), listing.class_names)


def memorisation(
    kept: KeptFeatures, reference: Reference, training: Reference, source: RealImages
) -> tuple[Nearest, np.ndarray, dict[str, Any]]:
    """The nearest training images of the samples, by place; the number in `source` of each of the training images used, by row of these;
    and what the evaluation record says. training: the features of `source`.

    Raises UserError where too few of the training images can be used.
    """
    assert training.features is not None
    assert training.index is not None
    total = sum(stop - start for start, stop in kept.ranges)
    tasks = Tasks(max(total, len(training.features)) <= HERE)
    try:
        known = TrainingImages(training.features, tasks)
    except ValueError as error:
        raise UserError(str(error)) from error
    found = known.nearest_to_kept(kept)
    record: dict[str, Any] = {
        "share": float(found.closer.mean()),
        "standard_error": share_error(found.closer),
        "copies": int(found.same.sum()),
        "training_images": len(training.features),
        "source": source.images.source,
        "chosen": "every class in turn, in the order of the keys",
        "definition": DEFINITION,
        **_of_reference(known, reference),
    }
    return found, training.index, null_for_nan(record)


def _of_reference(known: TrainingImages, reference: Reference) -> dict[str, Any]:
    if reference.features is None:
        return {}
    found = known.nearest_to(reference.features)
    if (copies := float(found.same.mean())) > MOST_COPIES:
        return {"reference_left_out": f"{copies:.0%} of the reference's images are training images"}
    return {"reference": float(found.closer.mean()), "reference_standard_error": share_error(found.closer)}


def show_neighbours(
    path: str, places: np.ndarray, kept: KeptFeatures, found: Nearest, training: tuple[RealImages, np.ndarray], reader: Reader
) -> list[dict[str, Any]]:
    """Write a picture with a row for each sample at these places: the sample, then its nearest training images; the row with the smallest
    ratio of distance to spacing first. training: the source, and the number in it of each training image. Returns the rows as plain values:
    sample, label, ratio, distances and keys."""
    numbers = kept.numbers()
    places = places[np.argsort(found.ratio[places], kind="stable")]
    source, index = training
    wanted = index[found.rows[places]]  # (n, K), numbers in the source
    pixels = dict(zip(np.unique(wanted).tolist(), _decoded(source, np.unique(wanted).tolist()), strict=True))
    samples = reader.take(numbers["index"][places])
    write_rows(path, [[sample, *(pixels[one] for one in row)] for sample, row in zip(samples, wanted.tolist(), strict=True)])
    return [
        {
            "sample": int(numbers["index"][place]),
            "label": int(numbers["label"][place]),
            "ratio": null_for_nan(float(found.ratio[place])),
            "distances": [round(float(one), 4) for one in found.distances[place]],
            "keys": [source.rows[one].key for one in row],
        }
        for place, row in zip(places.tolist(), wanted.tolist(), strict=True)
    ]


def _decoded(source: RealImages, numbers: Sequence[int]) -> list[np.ndarray | None]:
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as threads:
        return list(threads.map(lambda number: decode_row(source.images, source.rows[number]).pixels, numbers))
