"""Images → feature network, on Ray Data: what an evaluation and its reference have in common."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluation.classifier.network import load_classifier
from pipelines.evaluation.features import load_network
from pipelines.evaluation.scoring.feature_shards import FeatureShard, KeptFeatures, is_whole, write_shard
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import default_device, use_threads
from pipelines.runtime.errors import UserError

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
    kept: Sequence[str]  # where the features of each source go, by its number


def scored(dataset: "Dataset", judges: Judges) -> Iterator[dict[str, np.ndarray]]:
    """The dataset's blocks in order, each without its images: the features go to Arrow shards in `judges.kept`, and stay there.

    Columns of the dataset: `image` (uint8), `index`, `label`, `start` and `stop` (the block's places) and `source` (the set's number),
    the last three of which are added to drawn samples; all but `image` are passed on. With a classifier `predicted` (int64) is added.
    Raises UserError for an image whose features are not finite.
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
    """Holds the judges; both are loaded when the first image comes whose features are not there."""

    def __init__(self, judges: Judges) -> None:
        use_threads(judges.cluster)
        self.judges = judges

    @cached_property
    def network(self) -> Any:
        return load_network(self.judges.features, self.judges.weights, default_device())

    @cached_property
    def classifier(self) -> Any:
        return load_classifier(self.judges.classifier).to(default_device())

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = block.pop("image")
        if not len(images):
            return block
        count = len(images)
        if "source" not in block:  # samples as they were drawn, a block a shard
            first = int(block["index"][0])
            block |= {"source": np.zeros(count, np.int64), "start": np.full(count, first), "stop": np.full(count, first + count)}
        path, place = self.judges.kept[int(block["source"][0])], (int(block["start"][0]), int(block["stop"][0]))
        asked = bool(self.judges.classifier)
        if is_whole(path, place, asked):
            block["predicted"] = KeptFeatures(path, (place,)).numbers()["predicted"]
            return block
        features = self.network.features(images)
        finite = np.logical_and.reduce([np.isfinite(one).all(axis=1) for one in features])
        if not finite.all():
            first = int(block["index"][np.argmin(finite)])
            raise UserError(
                f"{count - int(finite.sum())} of {count} images have features that are not finite, the first is image {first} of those in "
                f"{path.rpartition('/')[0] or path}",
                remedy=f"check evaluate.weights, the weights of the feature network {self.judges.features}",
            )
        predicted = self.classifier.predict(images) if asked else np.full(count, -1)
        write_shard(path, FeatureShard(*place, block["index"], block["label"], predicted, features))
        block["predicted"] = predicted
        return block
