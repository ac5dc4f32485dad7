"""Validation while training: now and then a few samples of the newest checkpoint's averaged weights, drawn and judged beside the
training workers, on resources of their own, by Ray Train's asynchronous validation. Training does not wait."""

import functools
import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.checkpoints.directory import VALIDATION
from pipelines.evaluation import cautions
from pipelines.evaluation.features import load_network, network_digest
from pipelines.evaluation.features.sizes import DIMENSIONS
from pipelines.evaluation.record import check_count, metric_name
from pipelines.evaluation.references.find import find_reference
from pipelines.evaluation.references.made import source_statistics
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.statistics import FeatureStatistics, FeatureSums, distance
from pipelines.generation.planning import plan_drawing
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.worker import LoadedModel
from pipelines.images.grid import grid_samples, write_grid
from pipelines.images.listing import Images
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import default_device, require_workers, worker_resources
from pipelines.runtime.records import null_for_nan
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage
from pipelines.runtime.supervision.channel import TrainingChannel
from pipelines.runtime.supervision.messages import Validated
from pipelines.training.metrics.prometheus import Gauges
from pipelines.training.settings import TrainSettings

if TYPE_CHECKING:
    from ray.train import Checkpoint, ValidationConfig


def plan_validation(
    images: Images, tokenizer_path: str, train: TrainSettings, generate: GenerateSettings, evaluate: EvaluateSettings, stage: Stage
) -> "Validation":
    """Everything a validation needs but the checkpoint; the reference's statistics are computed now, where they are not there yet.

    Raises UserError for a reference or weights that are missing, and for a cluster without room beside the training workers.
    """
    cluster = stage.cluster
    check_count("train.validation_samples", train.validation_samples)
    require_workers({"train.workers": train.workers, "validations at once (train.validation_images)": 1}, cluster)
    digest = network_digest(evaluate.features, evaluate.weights)
    reference = find_reference(images, tokenizer_path, evaluate, digest)
    if not isinstance(reference, FeatureStatistics):
        [reference] = source_statistics([reference], evaluate, digest, stage)
    drawn = replace(generate, precision=resolved(generate.precision, cluster), ema=True)
    validation = Validation(tokenizer_path, train, drawn, evaluate.features, evaluate.weights, digest, reference, stage.seed, cluster)
    if caution := cautions.of_distance(validation.counts, evaluate.features):
        stage.say(f"validations: {caution}")
    return validation


@dataclass(frozen=True)
class Validation:
    """What Ray Train's validation task is given."""

    tokenizer_path: str
    train: TrainSettings
    generate: GenerateSettings
    features: str
    weights: str
    digest: str  # of the feature network
    reference: FeatureStatistics
    seed: int
    cluster: ClusterSettings

    @property
    def metric(self) -> str:
        """The name under which what it finds goes to MLflow."""
        return f"{VALIDATION}_{metric_name(self.features)}"

    @property
    def counts(self) -> dict[str, int | None]:
        """The images that a distance is of."""
        return {"samples": self.train.validation_samples, "reference images": self.reference.count}

    @property
    def identity(self) -> str:
        """Of all that a distance depends on beside the weights: distances of the same identity can be compared."""
        drawn = identity_of(generate=self.generate, seed=self.seed)
        judged = {"samples": self.train.validation_samples, "network": self.digest, "reference": self.reference.identity()}
        return storage.digest(json.dumps({**drawn, **judged}, sort_keys=True).encode())

    def config(self, channel: TrainingChannel) -> "ValidationConfig":
        """For the trainer: what is run for a checkpoint that is reported with a validation, and on what."""
        from ray.train import ValidationConfig

        run = functools.partial(validate, validation=self, channel=channel)
        return ValidationConfig(run, ray_remote_kwargs=worker_resources(self.cluster))

    def report(self, found: Validated, stage: Stage, gauges: Gauges) -> None:
        """In the driver: print the result of a validation and send it to MLflow and Prometheus."""
        metrics = found.metrics
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        caution = cautions.of_distance_in_short(self.counts, self.features)
        effort = f"{self.train.validation_samples:,} samples, {found.seconds:.0f} s{f'; {caution}' if caution else ''}"
        stage.say(f"validation at {found.images_seen:,} images: {shown} ({effort})")
        stage.log({f"{VALIDATION}_{name}": value for name, value in metrics.items()}, step=found.images_seen)
        gauges.of_validation(metrics)
        stage.artifact(found.picture)


def validate(checkpoint: "Checkpoint", path: str, validation: Validation, channel: TrainingChannel) -> dict[str, float]:
    """Validate the checkpoint at `path`: `validation/images-….json` and the samples as `.png` beside. Returns the metrics by name, none
    where the person has asked the run to end: it would wait for this.

    Sample i is the same function of the weights every time. What goes wrong here is told, and training goes on.
    """
    if channel.stopping():
        return {}
    if not storage.exists(path):
        channel.say(f"{path} was dropped before its validation began: raise train.validation_images or train.checkpoints_kept")
        return {}
    try:
        found = _measured(path, validation, channel)
    except Exception as error:
        channel.say(f"validation of {path} failed, training continues: {type(error).__name__}: {error}")
        raise  # Ray Train writes the traceback into its log
    if found is None:
        return {}
    channel.send(found)
    return found.metrics


def _measured(path: str, validation: Validation, channel: TrainingChannel) -> Validated | None:
    began = time.monotonic()
    count, generate = validation.train.validation_samples, replace(validation.generate, checkpoint=path)
    target = storage.join(validation.train.path, VALIDATION, path.rstrip("/").rpartition("/")[2])
    stage = Stage("validation", validation.cluster, seed=validation.seed)
    drawing = plan_drawing(target, validation.tokenizer_path, validation.train.path, generate, stage)
    model = LoadedModel(drawing)
    network = load_network(validation.features, validation.weights, default_device())
    sums = FeatureSums(DIMENSIONS[validation.features])
    shown = grid_samples(count, len(drawing.labels))
    kept = []
    for start in range(0, count, generate.batch):
        if channel.stopping():
            return None
        numbers = range(start, min(start + generate.batch, count))
        images, _ = model.images(_labels(drawing.labels, numbers), numbers)
        sums.merge(FeatureSums.of(network(images)))
        kept.append(images[: max(0, shown - start)])
    metrics = {
        metric_name(validation.features): distance(FeatureStatistics.of(sums, validation.features, validation.digest), validation.reference)
    }
    picture = f"{target}.png"
    write_grid(picture, np.concatenate(kept), _labels(drawing.labels, range(shown)))
    found = Validated(drawing.state["images_seen"], metrics, picture, time.monotonic() - began)
    values = {"metrics": metrics, "picture": picture, "seconds": found.seconds, "identity": validation.identity}
    about: dict[str, Any] = {"samples": count, "reference_images": validation.reference.count, "seed": validation.seed, "checkpoint": path}
    if caution := cautions.of_distance(validation.counts, validation.features):
        about["caution"] = caution
    storage.write_json(f"{target}.json", null_for_nan({"validated": found.images_seen, **values, **about}))
    return found


def _labels(classes: list[int], numbers: range) -> np.ndarray:
    """(N,) int64: every class in turn."""
    return np.array([classes[number % len(classes)] for number in numbers])
