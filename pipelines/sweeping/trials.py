"""The trials of a sweep: every combination of the swept values, each with the whole configuration it runs with."""

import difflib
import itertools
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mar_model.config import Architecture
from pipelines.caching.settings import CacheSettings
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import Images
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.sweeping.settings import SweepSettings
from pipelines.training.settings import LOSS_COLUMNS, TrainSettings

SWEPT_SECTIONS = {"train": ("model", "train"), "generate": ("generate",)}
NOT_SWEPT = (  # a trial has its own, or none
    "train.path", "generate.path", "generate.checkpoint", "generate.images", "generate.labels", "generate.samples", "generate.image",
    "generate.mask", "generate.keep_pixels", "generate.film",
)  # fmt: skip


@dataclass(frozen=True)
class Sections:
    """The configuration a trial runs with."""

    images: Images
    tokenizer_path: str
    cache: CacheSettings
    model: Architecture
    train: TrainSettings
    generate: GenerateSettings
    evaluate: EvaluateSettings

    def with_values(self, values: dict[str, Any]) -> "Sections":
        """A copy with the given `section.key` → value."""
        changed: Any = self
        for name, value in values.items():
            section, key = name.split(".")
            changed = replace(changed, **{section: replace(getattr(changed, section), **{key: value})})
        return changed  # type: ignore[no-any-return]

    def configuration(self) -> dict[str, Any]:
        """Section → settings, as MLflow logs them."""
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("images", "tokenizer_path")}
        return {
            "images": asdict(self.images.settings),
            "tokenizer": {"path": self.tokenizer_path},
            **{name: asdict(section) for name, section in settings.items()},
        }


@dataclass(frozen=True)
class Trial:
    """One combination of the grid."""

    name: str  # readable: temperature=0.9
    path: str
    parameters: dict[str, Any]  # section.key → value
    sections: Sections


def grid(sections: Sections, sweep: SweepSettings) -> list[Trial]:
    """Every combination of the parameters, in their order. Raises UserError naming the parameter that can't be swept."""
    allowed = [f"{section}.{one.name}" for section in SWEPT_SECTIONS[sweep.over] for one in fields(getattr(sections, section))]
    allowed = [name for name in allowed if name not in NOT_SWEPT]
    if not sweep.parameters:
        raise UserError(f"sweep.parameters is empty, expected names and values, e.g. {{{allowed[-1]}: […]}}")
    for name, choices in sweep.parameters.items():
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1, 0.0)[0]
            raise UserError(
                f"sweep.parameters names {name!r}; a sweep over {sweep.over} takes the keys of "
                f"{' and '.join(SWEPT_SECTIONS[sweep.over])}, the nearest is {near!r}"
            )
        if not isinstance(choices, list) or not choices:
            raise UserError(f"sweep.parameters {name} is {choices!r}, expected a list of one value or more")
        section, key = name.split(".")
        present = getattr(getattr(sections, section), key)
        for value in choices:
            if not _same_kind(value, present):
                raise UserError(f"sweep.parameters {name} has the value {value!r}, expected {type(present).__name__}, as in {present!r}")
    keys = [name.split(".")[1] for name in sweep.parameters]
    shown = {name: name if keys.count(key) > 1 else key for name, key in zip(sweep.parameters, keys, strict=True)}
    trials: dict[str, Trial] = {}
    for combination in itertools.product(*sweep.parameters.values()):
        parameters = dict(zip(sweep.parameters, combination, strict=True))
        name = ",".join(f"{shown[one]}={re.sub(r'[^A-Za-z0-9._+-]+', '-', str(value))}" for one, value in parameters.items())
        if name in trials:
            first, second = (", ".join(map(repr, one.values())) for one in (trials[name].parameters, parameters))
            raise UserError(f"sweep.parameters makes the trial {name} twice, for {first} and {second}", remedy="give other values")
        path = storage.join(sweep.path, "trials", name)
        own_paths = {"evaluate.path": storage.join(path, "evaluation"), "generate.path": storage.join(path, "samples")}
        if sweep.over == "train":
            own_paths |= {"train.path": path, "generate.checkpoint": ""}
            if sections.train.keep_best.startswith("validation_"):  # trials are not validated
                own_paths |= {"train.keep_best": ""}
        values = {**parameters, **own_paths, "evaluate.images": sweep.images, "evaluate.training_images": 0}
        trials[name] = Trial(name, path, parameters, sections.with_values(values))
    return list(trials.values())


def _same_kind(value: Any, present: Any) -> bool:
    if isinstance(present, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(present, bool)
    return isinstance(value, int | float) if isinstance(present, float) else isinstance(value, type(present))


def _is_scored(sweep: SweepSettings) -> bool:
    return sweep.over == "generate" or sweep.metric not in LOSS_COLUMNS
