"""Options of `mar generate` that stand for settings: what is asked for again and again, in short."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from jobs.config.yaml_text import write_text
from jobs.path_options import path_given

SHORTCUTS = ("label", "image", "mask", "film", "out")  # parameters of `mar generate`
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")  # 010 is a name
Label = Annotated[list[str] | None, typer.Option("--label", metavar="CLASS", help="draw this class, number or name; repeatable")]
Image = Annotated[str, typer.Option("--image", metavar="FILE", callback=path_given, help="complete this image: draw what --mask hides")]
Mask = Annotated[str, typer.Option("--mask", metavar="FILE", callback=path_given, help="of the image's size, white where to draw")]
Film = Annotated[bool, typer.Option("--film", help="write film.webp, the picture as it forms")]
Out = Annotated[str, typer.Option("--out", metavar="DIR", callback=path_given, help="where to write: generate.path")]


def as_assignments(given: Mapping[str, Any]) -> list[str]:
    """The options as `section.key=value` texts that `load` takes; those that were not given, and other commands', say nothing."""
    labels = [int(one) if NUMBER.fullmatch(one) else one for one in given.get("label") or []]
    texts = [f"generate.labels={json.dumps(labels, ensure_ascii=False)}"] if labels else []
    texts += [f"generate.{name}={write_text(given[name])}" for name in ("image", "mask") if given.get(name)]
    texts += ["generate.film=true"] if given.get("film") else []
    return texts + ([f"generate.path={write_text(given['out'])}"] if given.get("out") else [])
