"""Fréchet distances of generated, real and noise images at equal numbers of images."""

import json
from collections import Counter
from collections.abc import Sequence

from pipelines.evaluation import cautions
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.image_sets.sets import DrawnSamples, ImageSource, NoiseImages, RealImages, ReconstructedImages
from pipelines.evaluation.record import RECORD, Record
from pipelines.evaluation.references.made import source_statistics
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import distance
from pipelines.images.listing import Images
from pipelines.images.sources.table import ImageRow
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import SUMMARY, Stage


def real_and_noise(images: Images, seed: int, count: int, tokenizer_path: str = "") -> dict[str, ImageSource]:
    """What generated images are compared with at equal numbers: `count` images each of the held-out part, the train part, and noise; with a
    tokenizer also its reconstructions of the images of the train part.

    Images are taken class by class in turn, so that equal numbers of each class meet. Raises UserError where fewer are there.
    """
    parts = {"held_out": images.listing.held_out(), "real_train": images.listing.train()}
    for name, rows in parts.items():
        _require(name, len(rows), count)
    chosen = {name: _in_turn(rows, count) for name, rows in parts.items()}
    return {
        **{name: RealImages(images.settings, chosen[name]) for name in parts},
        **({"reconstructed": ReconstructedImages(images.settings, chosen["real_train"], tokenizer_path)} if tokenizer_path else {}),
        "noise": NoiseImages(count, images.settings.size, seed),
    }


def _require(name: str, found: int, count: int) -> None:
    if found < count:
        raise UserError(f"{found} images {name.replace('_', ' ')}, expected {count} to compare equal numbers", remedy="lower the number")


def frechet_rows(images: Images, evaluate: EvaluateSettings, count: int, stage: Stage, tokenizer_path: str = "") -> dict[str, float]:
    """Distances from the first `count` held-out images to as many real ones of the train part, the tokenizer's reconstructions of these (if
    it is given), generated images (a finished evaluation's), and images of noise: `real_train`, `reconstructed`, `generated`, `noise`.
    What lies between the first two rows is the tokenizer's share of the distance. Kept in `evaluate.path/rows`.

    Where `count` is too small for a distance, a caution is printed. Raises UserError as `real_and_noise` does.
    """
    digest = network_digest(evaluate.features, evaluate.weights)
    record_path = storage.join(evaluate.path, RECORD)
    if not storage.exists(record_path):
        raise UserError(f"evaluate.path {evaluate.path!r} holds no finished evaluation ({RECORD} is missing)", remedy="run `mar evaluate`")
    again = f"delete {storage.join(evaluate.path, SUMMARY)} and run `mar evaluate` again: the samples are kept"
    record = storage.read_json(record_path, Record, again)
    _require("generated", record["images"], count)
    others = real_and_noise(images, stage.seed, count, tokenizer_path)
    noise = others.pop("noise")
    sources: dict[str, ImageSource] = {
        **others, "generated": DrawnSamples(evaluate.path, count, record["identity"]), "noise": noise,
    }  # fmt: skip
    path = storage.join(evaluate.path, "rows")
    identity = {name: storage.digest(json.dumps(source.identity(), sort_keys=True).encode()) for name, source in sources.items()}
    finished = stage.begin(path, {**identity, "network": digest})
    if finished is None:
        statistics = dict(zip(sources, source_statistics(list(sources.values()), evaluate, digest, stage), strict=True))
        held_out = statistics.pop("held_out")
        rows = {name: distance(one, held_out) for name, one in statistics.items()}
        finished = stage.complete(path, {**identity, "network": digest}, {"images": count, "features": evaluate.features, **rows})
    if caution := cautions.of_distance({cautions.ROW_IMAGES: count}, evaluate.features):
        stage.say(caution)
    return {name: finished[name] for name in sources if name != "held_out"}


def _in_turn(rows: Sequence[ImageRow], count: int) -> list[ImageRow]:
    """`count` rows, every class in turn, sorted by key: the same rows whatever order they came in."""
    places: Counter[int] = Counter()
    ranked = []
    for row in sorted(rows, key=lambda row: row.key):
        ranked.append((places[row.label], row.label, row))
        places[row.label] += 1
    chosen = sorted(ranked, key=lambda one: one[:2])[:count]
    return sorted((row for _, _, row in chosen), key=lambda row: row.key)
