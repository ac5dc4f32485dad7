"""Options of `mar generate` that stand for settings: what is asked for again and again, in short."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

Label = Annotated[list[str] | None, typer.Option("--label", metavar="CLASS", help="draw this class, number or name; repeatable")]
Image = Annotated[str, typer.Option("--image", metavar="FILE", help="complete this image: draw what --mask hides")]
Mask = Annotated[str, typer.Option("--mask", metavar="FILE", help="of the image's size, white where to draw")]
Film = Annotated[bool, typer.Option("--film", help="write film.webp, the picture as it forms")]
Out = Annotated[str, typer.Option("--out", metavar="DIR", help="where to write: generate.path")]


def as_assignments(given: Mapping[str, Any]) -> list[str]:
    """The options as `section.key=value` texts that `load` takes; those that were not given, and other commands', say nothing."""
    labels = [int(one) if one.removeprefix("-").isdecimal() else one for one in given.get("label") or []]
    texts = [f"generate.labels={json.dumps(labels)}"] if labels else []
    texts += [f"generate.{name}={given[name]}" for name in ("image", "mask") if given.get(name)]
    texts += ["generate.film=true"] if given.get("film") else []
    return texts + ([f"generate.path={given['out']}"] if given.get("out") else [])
