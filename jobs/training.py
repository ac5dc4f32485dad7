"""The stage *train* with the validations that the settings ask for."""

from contextlib import closing
from typing import Any

from mar_model.config import Architecture
from pipelines.caching.settings import CacheSettings
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.validation import plan_validation
from pipelines.generation.settings import GenerateSettings
from pipelines.images.settings import ImageSettings
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.training import stage as training
from pipelines.training.prometheus import Gauges, run_label
from pipelines.training.settings import TrainSettings


def train(
    images: ImageSettings, tokenizer: TokenizerSettings, cache: CacheSettings, model: Architecture, train: TrainSettings,
    generate: GenerateSettings, evaluate: EvaluateSettings, seed: int, stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    """Stage *train* with the validations that `train.validation_images` asks for; else `training.train` alone."""
    if not train.validation_images:
        return training.train(tokenizer, cache, model, train, seed, stage)
    validation = plan_validation(images, tokenizer, train, generate, evaluate, seed, stage)
    with closing(Gauges(run_label(train.path))) as gauges:
        return training.train(tokenizer, cache, model, train, seed, stage, validation, lambda found: validation.tell(found, stage, gauges))
