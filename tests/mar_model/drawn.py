"""`generate` with options, parts of a completion and the rest as keywords, as the tests mix them."""

from dataclasses import fields
from typing import Any

from torch import Tensor

import mar_model
from mar_model import MAR, Completion, GenerationOptions
from mar_model.noise import Noise

OPTIONS = {one.name for one in fields(GenerationOptions)}


def generate(model: MAR, labels: Tensor | None, noise: Noise, **given: Any) -> Tensor:
    options = GenerationOptions(**{name: given.pop(name) for name in OPTIONS & given.keys()})
    if "known" in given:
        given["completion"] = Completion(given.pop("known"), given.pop("fill"))
    return mar_model.generate(model, labels, noise, options, **given)
