"""Run a stage as a command, and turn what it raises into a user error or a logged failure."""

import importlib
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.stage_commands import STAGES
from pipelines.runtime.errors import UserError, in_one_line, mistake_of, origin_of

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig
    from pipelines.sweeping.trials import Sections

T = TypeVar("T")


class StageFailed(Exception):
    """A stage failed with an error that is not a user error. The text gives the cause and the location of the traceback."""


def run_stage(name: str, config: "RunConfig", **options: bool) -> dict[str, Any]:
    """Run one stage on Ray and return its summary. `options`: arguments of its function that are not settings.

    Raises UserError for a user error, also if a Ray worker raised it, and StageFailed for any other error. The traceback of the
    latter is written to `error.log` in the output directory.
    """
    command = STAGES[name]
    located = config.located()
    path = value_at(located, command.writes)

    def work() -> dict[str, Any]:
        from pipelines.runtime.stage import open_stage

        module, _, function = command.function.partition(":")
        do = getattr(importlib.import_module(module), function)
        arguments = {one: _argument(one, located) for one in command.arguments}
        with open_stage(name, path, config.recorded(), config.cluster, config.tracking, seed=config.seed) as stage:
            summary: dict[str, Any] = do(**arguments, stage=stage, **options)
        return summary

    return guarded(name, path, work)


def sections_of(config: "RunConfig") -> "Sections":
    """The sections that training and evaluation share."""
    from pipelines.images.listing import Images
    from pipelines.images.source_changes import LISTING
    from pipelines.runtime import storage
    from pipelines.sweeping.trials import Sections

    images = Images(config.images, kept=storage.join(config.cache.path, LISTING))
    return Sections(images, config.tokenizer.path, config.cache, config.model, config.train, config.generate, config.evaluate)


def _argument(name: str, config: "RunConfig") -> Any:
    """The value of one argument of a stage's function: a section, a path such as `train_path`, the images, or a sweep's sections."""
    if name == "sections":
        return sections_of(config)
    if name == "images":
        return sections_of(config).images
    return value_at(config, name.replace("_", "."))


def guarded(name: str, path: str, work: Callable[[], T]) -> T:
    """Return `work()`. Turns any exception into UserError, or into StageFailed with the traceback in `path/error.log`."""
    try:
        return work()
    except StageFailed:
        raise
    except Exception as error:
        from pipelines.runtime import s3

        mistake, origin = mistake_of(error), origin_of(error)
        if mistake is error:
            raise
        if mistake is not None:
            raise UserError(mistake.text, mistake.remedy) from error
        text = in_one_line(origin)
        if s3.refused(origin):
            raise UserError(text, remedy="fix this and run the same command again; finished work is kept") from error
        raise StageFailed(f"{name} failed: {type(origin).__name__}: {text}\n{_log(name, path, error)}") from error


def value_at(config: "RunConfig", key: str) -> Any:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name) if name else getattr(config, section)


def run_directory(config: "RunConfig") -> str:
    """The directory of the whole run: the parent of train.path."""
    from pipelines.runtime import storage

    return storage.parent(config.train.path)


def _log(name: str, path: str, error: BaseException) -> str:
    """Write the traceback to `path`, or to the working directory if `path` is not writable. Returns a text with its location."""
    from pipelines.runtime import storage

    text = "".join(traceback.format_exception(error)).encode()
    for target in (storage.join(path, "error.log"), f"{name}-error.log"):
        try:
            storage.write_bytes(target, text)
            return f"the traceback is in {target}"
        except Exception as unwritten:
            reason = unwritten
    return f"the traceback could not be written: {reason}"
