"""Ray Train's trainer without the callbacks that this project does not need; only private names of Ray give access to them."""

from typing import Any

from ray._private.services import get_webui_url_from_internal_kv
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class Trainer(TorchTrainer):
    """Without what hands out Ray Datasets, which our workers don't read: an actor in every start of a group, and a call to each worker.
    Where there is no dashboard, without the actor that would ask it whether the controller is lost, and then free its room."""

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback,) if get_webui_url_from_internal_kv() else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, idle)]
