"""A reference file made of an image source: every statistic that the metrics need, in the layout of ADM's files."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluation import npz
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.image_sets.sets import RealImages, ranges
from pipelines.evaluation.reference_file import chosen_rows
from pipelines.evaluation.references.made import source_statistics, statistics_path
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import REMEDY
from pipelines.images.listing import Images
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage

SPLITS = ("all", "train", "held_out")
WORK = ".work"  # ends the name of the folder beside the file in which an interrupted attempt resumes
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features", "count", "network", "digest")


def build_reference(out: str, images: Images, split: str, count: int, evaluate: EvaluateSettings, stage: Stage) -> dict[str, Any]:
    """Write the reference file `out` (.npz) of `count` images (0: all) of one part of the source, chosen by the hash of their keys.

    It holds `mu`, `sigma`, `mu_s`, `sigma_s`, `features` and `arr_0` of up to 10,000 images (for KID, precision, recall and ADM's suite),
    the network's name and digest, and `about`, JSON that says what it was made of. Returns a summary. Raises UserError for a file that is
    there already and was made of something else.
    """
    if not out.endswith(".npz"):
        raise UserError(f"--out is {out!r}, expected the name of an .npz file")
    rows = _chosen(images, split, count)
    source = RealImages(images.settings, rows)
    digest = network_digest(evaluate.features, evaluate.weights)
    about = {**source.identity(), "source": images.settings.source, "split": split, "chosen": len(rows), "network": digest}
    if storage.exists(out):
        found = npz.read(out, ("about",), REMEDY).get("about")
        if found is None or json.loads(str(found)) != about:
            raise UserError(f"{out} is there already and was made of other images or by another network", remedy="give another --out")
        stage.say(f"{out} is complete")
        return {"file": out, **about}
    work = replace(evaluate, path=out + WORK)
    [statistics] = source_statistics([source], work, digest, stage)
    arrays = npz.read(statistics_path(work, source, digest), ARRAYS, REMEDY)
    used = statistics.count or 0
    chosen = chosen_rows(used)
    shape = (len(chosen), images.settings.size, images.settings.size, 3)
    with npz.writing(out) as writer:
        for name in ARRAYS:
            writer.array(name, arrays[name])
        writer.array("about", json.dumps(about))
        writer.rows("arr_0", shape, np.uint8, _images(source, chosen, evaluate.batch))
    return {"file": out, "images": used, "images_kept": len(chosen), **{name: about[name] for name in ("source", "split", "size")}}


def _chosen(images: Images, split: str, count: int) -> ImageRows:
    """Rows of one part of the source, sorted by key."""
    listing = images.listing
    rows = {"all": listing.rows, "train": listing.train(), "held_out": listing.held_out()}[split]
    if len(rows) < max(count, 2):
        raise UserError(
            f"images.source {images.settings.source!r} has {len(rows):,} images in the part {split!r}, expected {max(count, 2):,} or more",
            remedy="lower --images, or choose another --split",
        )
    if not count:
        return rows
    keys = rows.column("key")
    order = sorted(range(len(keys)), key=lambda number: hashlib.sha256(keys[number].encode()).digest())[:count]
    return ImageRows(rows.table.take(pa.array(sorted(order))))


def _images(source: RealImages, chosen: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """The pixels of these images, counted among those that can be read."""
    first = 0
    for start, stop in ranges(len(source), batch):
        images = source.read(start, stop)
        wanted = chosen[(chosen >= first) & (chosen < first + len(images))] - first
        first += len(images)
        yield images[wanted]
