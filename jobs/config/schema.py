"""The run configuration: one schema for the settings of all stages."""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field

from jobs.stage_commands import STAGES
from mar_model.config import Architecture
from pipelines.caching.settings import CacheSettings
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.generation.settings import GenerateSettings
from pipelines.images.settings import ImageSettings
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.settings import Whole
from pipelines.runtime.tracking import TrackingSettings, without_password
from pipelines.sweeping.settings import SweepSettings
from pipelines.tokenizing.settings import TokenizerSettings
from pipelines.training.settings import TrainSettings


class RunConfig(BaseModel):
    """All settings of a run. Each section is the settings dataclass of its stage."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    images: ImageSettings = Field(default_factory=ImageSettings)
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    cache: CacheSettings = Field(default_factory=CacheSettings)
    model: Architecture = Field(default_factory=Architecture)
    train: TrainSettings = Field(default_factory=TrainSettings)
    generate: GenerateSettings = Field(default_factory=GenerateSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    sweep: SweepSettings = Field(default_factory=SweepSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    seed: Whole = 0

    def plain(self) -> dict[str, Any]:
        """{section: {key: value}} and `seed`, as plain values for YAML and MLflow."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for name, value in sections.items()}  # type: ignore[arg-type]

    def located(self) -> "RunConfig":
        """The same configuration with absolute local paths, because Ray's workers have other working directories."""
        changed: dict[str, dict[str, str]] = {}
        for key in LOCATIONS:
            section, _, name = key.partition(".")
            value = getattr(getattr(self, section), name).removeprefix("file://")
            if value and "://" not in value:
                changed.setdefault(section, {})[name] = os.path.abspath(os.path.expanduser(value))
        return self.model_copy(update={name: dataclasses.replace(getattr(self, name), **values) for name, values in changed.items()})

    def recorded(self) -> dict[str, Any]:
        """`plain()` for outputs and MLflow: without a password in the tracking address."""
        values = self.plain()
        values["tracking"]["uri"] = without_password(values["tracking"]["uri"])
        return values

    def yaml(self) -> str:
        """The whole configuration as YAML. Loading it with --config gives the same configuration."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)


WRITTEN = (*(stage.writes for stage in STAGES.values()), "tracking.uri")  # settings with output locations
LOCATIONS = (
    "images.source", "tokenizer.path", "tokenizer.init_from", "tokenizer.perceptual_weights", "cache.path", "cache.local", "train.path",
    "train.init_from", "generate.path", "generate.checkpoint", "generate.image", "generate.mask", "evaluate.path", "evaluate.samples",
    "evaluate.tokenizer", "evaluate.lpips_weights", "evaluate.reference", "evaluate.weights",
    "evaluate.classifier", "sweep.path",
)  # fmt: skip


def _key_types() -> dict[str, Any]:
    types: dict[str, Any] = {}
    for section, one in RunConfig.model_fields.items():
        if dataclasses.is_dataclass(one.annotation):
            hints = get_type_hints(one.annotation)
            types |= {f"{section}.{each.name}": hints[each.name] for each in dataclasses.fields(one.annotation)}
        else:
            types[section] = one.annotation
    return types


TYPES: dict[str, Any] = _key_types()  # section.key → its type
SECTIONS = tuple(name for name in RunConfig.model_fields if name not in TYPES)


def _yaml_files(folder: Path) -> list[str]:
    return [str(one) for one in folder.glob("*.y*ml")] if folder.is_dir() else []
