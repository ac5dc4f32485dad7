"""Patterns of files such as `shard-{000..146}.tar`, and the folder that a listing's files are relative to."""

import posixpath
import re

FILES = (".tar", ".parquet")  # files that contain many images


def root_of(source: str) -> str:
    """The folder that a listing's files are relative to."""
    if "{" in source:
        return posixpath.dirname(source[: source.index("{")])
    return posixpath.dirname(source) if source.endswith(FILES) else source


def expanded(pattern: str) -> list[str]:
    """The paths of a brace pattern: `{000..146}` is a range (zero-padded as written), `{a,b}` a list; several braces multiply."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers.groups()
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return [path for choice in choices for path in expanded(pattern[: found.start()] + choice + pattern[found.end() :])]
