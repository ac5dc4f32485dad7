"""The stage *train*, with validation if the settings ask for it."""

from contextlib import closing
from typing import Any

from mar_model.config import Architecture
from pipelines.caching.settings import CacheSettings
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.validation import plan_validation
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import Images
from pipelines.runtime.stage import Stage
from pipelines.runtime.supervision.messages import Validated
from pipelines.training import stage as training
from pipelines.training.metrics.prometheus import Gauges, run_label
from pipelines.training.settings import TrainSettings


def train(
    images: Images, tokenizer_path: str, cache: CacheSettings, model: Architecture, train: TrainSettings,
    generate: GenerateSettings, evaluate: EvaluateSettings, stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    """Run `training.train`, with validation every `train.validation_images` if that is not 0."""
    if not train.validation_images:
        return training.train(tokenizer_path, cache, model, train, stage)
    validation = plan_validation(images, tokenizer_path, train, generate, evaluate, stage)
    with closing(Gauges(run_label(train.path))) as gauges:

        def report(found: Validated) -> None:
            validation.report(found, stage, gauges)

        return training.train(tokenizer_path, cache, model, train, stage, validation, report)
