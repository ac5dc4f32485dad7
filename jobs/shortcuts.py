"""Options of `mar generate` that are short forms of settings."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from jobs.config.yaml_text import write_text
from jobs.path_options import path_given

SHORTCUTS = ("label", "image", "mask", "film", "out")  # parameters of `mar generate`
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")  # 010 is a name
Label = Annotated[list[str] | None, typer.Option("--label", metavar="CLASS", help="class to draw, a number or a name; repeatable")]
Image = Annotated[str, typer.Option("--image", metavar="FILE", callback=path_given, help="image to complete: draw where --mask is white")]
Mask = Annotated[str, typer.Option("--mask", metavar="FILE", callback=path_given, help="mask of the image's size, white where to draw")]
Film = Annotated[bool, typer.Option("--film", help="also write film.webp, the image after every step")]
Out = Annotated[str, typer.Option("--out", metavar="DIR", callback=path_given, help="output directory (generate.path)")]


def as_assignments(given: Mapping[str, Any]) -> list[str]:
    """The given options as `section.key=value` texts for `load`."""
    labels = [int(one) if NUMBER.fullmatch(one) else one for one in given.get("label") or []]
    texts = [f"generate.labels={json.dumps(labels, ensure_ascii=False)}"] if labels else []
    texts += [f"generate.{name}={write_text(given[name])}" for name in ("image", "mask") if given.get(name)]
    texts += ["generate.film=true"] if given.get("film") else []
    return texts + ([f"generate.path={write_text(given['out'])}"] if given.get("out") else [])
