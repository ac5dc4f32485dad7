"""Images → feature network, on Ray Data: what an evaluation and its reference have in common."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluation.classifier import load_classifier
from pipelines.evaluation.features import load_network
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import default_device, use_threads

if TYPE_CHECKING:
    from ray.data import Dataset


@dataclass(frozen=True)
class Judges:
    """What looks at images: the feature network and, if any, the classifier. What a scoring actor is given."""

    features: str
    weights: str
    classifier: str
    actors: int
    cluster: ClusterSettings


def scored(dataset: "Dataset", judges: Judges) -> Iterator[dict[str, np.ndarray]]:
    """The dataset's blocks in order, each with its `image` column replaced by `features` (float32 N×D) and, with a classifier,
    `predicted` (int64).

    Features, not their outer products, travel to the driver: a block of 64 images is 64 vectors, its outer product 2,048.
    """
    import ray.data

    results = dataset.map_batches(
        ScoringActor,
        fn_constructor_args=(judges,),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=judges.actors),
        num_cpus=0,  # so that it starts however many drawing actors fill the cluster, and no two of them wait for each other
        num_gpus=judges.cluster.gpus_per_worker,
    )
    yield from results.iter_batches(batch_size=None, batch_format="numpy")


class ScoringActor:
    """Holds the judges."""

    def __init__(self, judges: Judges) -> None:
        use_threads(judges.cluster)
        self.judges = judges
        self.network = load_network(judges.features, judges.weights, default_device())

    @cached_property
    def classifier(self) -> Any:
        return load_classifier(self.judges.classifier).to(default_device())

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = block.pop("image")
        block["features"] = self.network(images)
        if self.judges.classifier:
            block["predicted"] = self.classifier.predict(images)
        return block
