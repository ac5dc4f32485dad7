"""How a stage's settings are written down: plain dataclasses whose every field is either *identity* (it changes what is
computed: a resume with another value is refused) or *operational* (it changes how: workers, cadence, cluster, length)."""

from dataclasses import MISSING, asdict, field, fields, is_dataclass
from typing import Any


def identity(default: Any = MISSING, help: str = "", factory: Any = MISSING) -> Any:
    """A dataclass field that takes part in the identity of a stage's output."""
    return field(default=default, default_factory=factory, metadata={"identity": True, "help": help})


def operational(default: Any = MISSING, help: str = "", factory: Any = MISSING) -> Any:
    """A dataclass field that changes how the work is done, never its result."""
    return field(default=default, default_factory=factory, metadata={"identity": False, "help": help})


def identity_of(**sections: Any) -> dict[str, Any]:
    """The identity fields of the given settings as one flat mapping `section.field` → plain value.

    A section is a settings dataclass (its identity fields are taken; of a dataclass without marks every field is), or a
    plain value.
    """
    flat: dict[str, Any] = {}
    for name, section in sections.items():
        if not is_dataclass(section):
            flat[name] = section
            continue
        values = asdict(section)  # type: ignore[arg-type]
        for one in fields(section):
            if one.metadata.get("identity", True):
                flat[f"{name}.{one.name}"] = values[one.name]
    return flat
