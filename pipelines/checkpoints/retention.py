"""Retention: which checkpoints of a run are kept."""

import contextlib
import math
from collections.abc import Mapping

from mar_model.checkpoints.checkpoint import STATE
from pipelines.checkpoints.directory import VALIDATION, TrainingState, Validated, checkpoint_names, images_of
from pipelines.runtime import storage
from pipelines.runtime.records import nan_for_null


def drop_old_checkpoints(newest: str, kept: int, every_images: int, scores: Mapping[str, float], damaged: set[str]) -> None:
    """Delete checkpoints older than `newest` (a path), except the `kept` − 1 newest of them, the one with the lowest finite value in
    `scores` (name → value), and the first after every `every_images` images (0: none). The `damaged` checkpoints, newer than the one that
    the run resumed from, do not count, and are deleted when the run has passed them.
    """
    folder, _, last = newest.rpartition("/")
    names = [name for name in checkpoint_names(folder.rpartition("/")[0]) if name <= last]
    superseded = [name for name in names if name in damaged and name != last]
    names = [name for name in names if name not in superseded]
    ranked = {name: scores[name] for name in names if math.isfinite(scores.get(name, math.nan))}
    permanent = {min(ranked, key=lambda name: ranked[name])} if ranked else set[str]()
    if every_images:
        firsts = {images_of(name) // every_images: name for name in reversed(names)}
        permanent |= {name for number, name in firsts.items() if number}
    for name in [*superseded, *names[:-kept]]:
        if name not in permanent:
            storage.delete(storage.join(folder, name))


class Scores(dict[str, float]):
    """Values of `metric` by checkpoint name: a training metric from the checkpoint's last row that has it, or a `validation_…` metric from
    the checkpoint's validation with this identity (see `Validation.identity`)."""

    def __init__(self, train_path: str, metric: str, validated_as: str = "") -> None:
        super().__init__()
        self.train_path, self.metric, self.validated_as = train_path, metric, validated_as
        self.refresh()

    def refresh(self) -> None:
        """Read the values of new checkpoints and validations."""
        for name in reversed(checkpoint_names(self.train_path)) if self.metric else ():
            if name not in self:
                with contextlib.suppress(ValueError, LookupError):  # missing or damaged
                    self[name] = self._value(name)

    def _value(self, name: str) -> float:
        """Raises LookupError if there is none, ValueError if the file is damaged."""
        validated = self.metric.startswith(f"{VALIDATION}_")
        file = storage.join(VALIDATION, f"{name}.json") if validated else storage.join("checkpoints", name, STATE)
        if not storage.exists(path := storage.join(self.train_path, file)):
            raise KeyError(path)
        found = storage.read_json(path, Validated if validated else TrainingState)
        if not validated:
            return float([nan_for_null(line)[self.metric] for line in found["intervals"] if self.metric in line][-1])
        if found["identity"] != self.validated_as:
            raise KeyError(self.validated_as)
        return float(nan_for_null(found["metrics"])[self.metric.removeprefix(f"{VALIDATION}_")])
