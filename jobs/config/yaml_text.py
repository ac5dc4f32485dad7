"""YAML for configurations: duplicate keys are errors, and scalars follow YAML 1.2 (`no`, `010`, `12:30` and dates are text)."""

import json
import re
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
PLAIN = {  # plain scalars that are not text: pattern, and the characters that they can start with
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


class DuplicateKey(yaml.YAMLError):
    """A mapping contains a key twice. The text gives the key and both positions."""

    def __init__(self, first: yaml.ScalarNode, second: yaml.ScalarNode) -> None:
        one, other = first.start_mark, second.start_mark
        lines = f"lines {one.line + 1} and {other.line + 1}"
        if one.line == other.line:
            lines = f"line {one.line + 1}, columns {one.column + 1} and {other.column + 1}"
        super().__init__(f"the key {second.value!r} is given twice in one mapping, at {lines}; remove one of them")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # not YAML 1.1's

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Find duplicates before merge keys (`<<`) are resolved, because merged keys may be overridden."""
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and seen.setdefault((key.tag, key.value), key) is not key:
                raise DuplicateKey(seen[key.tag, key.value], key)
        return node


for _name, (_pattern, _first) in PLAIN.items():
    _Loader.add_implicit_resolver(TAG + _name, re.compile(f"(?:{_pattern})$"), list(_first))


def parse(text: str) -> Any:
    """The value of a YAML document.

    Raises DuplicateKey if a mapping contains a key twice, and yaml.YAMLError if the text is not YAML.
    """
    return yaml.load(text, _Loader)


def parse_text(value: str) -> str:
    """A text setting: taken literally (also `2024`, `no` and `a # b`), or quoted as in YAML. Raises as `parse` does."""
    text = value.strip()
    found = parse(text) if text[:1] in ("'", '"') else text
    return found if isinstance(found, str) else text


def write_text(text: str) -> str:
    """The inverse of `parse_text`."""
    as_it_stands = text.isprintable() and text == text.strip() and text[:1] not in ("", "'", '"')
    return text if as_it_stands else json.dumps(text, ensure_ascii=False)
