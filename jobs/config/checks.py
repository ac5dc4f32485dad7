"""Checks of a configuration: ranges, divisibility, contradictions."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.runtime.settings import misfits as settings_misfits

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig


def misfits(config: "RunConfig") -> Iterator[tuple[str, str]]:
    """Yield (section.key, message) for every setting that is out of range, or does not fit another."""
    sections = {name: getattr(config, name) for name in type(config).model_fields if name not in ("seed", "model")}
    found = [misfit for name, settings in sections.items() for misfit in settings_misfits(name, settings)]
    try:
        config.model.check()
    except ValueError as error:
        text = re.sub(r"(of|makes) (?=encoder|decoder)", r"\1 model.", f"model.{error}")
        found.append((text.split()[0], text))
    yield from found or _not_dividing(config)


def _not_dividing(config: "RunConfig") -> Iterator[tuple[str, str]]:
    stride, patch = config.tokenizer.stride, config.model.patch_size
    if misfit := config.tokenizer.misfit_of(config.images.size):
        yield "images.size", misfit
    elif config.images.size // stride % patch:
        about = f"the latent side {config.images.size // stride} (images.size {config.images.size} / tokenizer stride {stride})"
        yield "model.patch_size", f"model.patch_size is {patch}, expected a divisor of {about}"
