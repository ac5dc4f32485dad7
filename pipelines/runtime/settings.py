"""Settings of a stage: plain dataclasses. Each field is either *identity* (it changes what is computed; resuming with another value is
refused) or *operational* (it changes how: workers, intervals, cluster, length).

A field's type contains its range, e.g. `batch: Count`, and pydantic checks it. The method `relations` of a section checks rules between
its fields, and yields (field, error message).
"""

from dataclasses import MISSING, asdict, field, fields, is_dataclass
from functools import cache
from math import inf
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pipelines.runtime.errors import UserError

Count = Annotated[int, Field(ge=1, description="a number above 0")]
Whole = Annotated[int, Field(ge=0, description="0 or more")]
Positive = Annotated[float, Field(gt=0, lt=inf, description="a number above 0")]
NonNegative = Annotated[float, Field(ge=0, lt=inf, description="0 or more")]
Share = Annotated[float, Field(ge=0, le=1, description="a share between 0 and 1")]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1, description="a share from 0 up to, not including, 1")]
RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")  # pydantic's types of errors


def identity(default: Any = MISSING, help: str = "", factory: Any = MISSING, *, added: bool = False) -> Any:
    """A dataclass field that is part of the identity of a stage's output. `added`: earlier versions did not have it, so that at its default
    it is left out of the identity, and outputs of earlier versions are still recognised."""
    return field(default=default, default_factory=factory, metadata={"identity": True, "help": help, "added": added})


def operational(default: Any = MISSING, help: str = "", factory: Any = MISSING) -> Any:
    """A dataclass field that changes how the work is done, but not its result."""
    return field(default=default, default_factory=factory, metadata={"identity": False, "help": help})


def identity_of(**sections: Any) -> dict[str, Any]:
    """The identity fields of these settings as one flat mapping `section.field` → plain value.

    A section is a settings dataclass or a plain value. Of a settings dataclass the identity fields are included; of any other dataclass,
    all fields. Left out are fields marked `added` at their default.
    """
    flat: dict[str, Any] = {}
    for name, section in sections.items():
        if not is_dataclass(section):
            flat[name] = section
            continue
        values = asdict(section)  # type: ignore[arg-type]
        for item in fields(section):
            unchanged = item.metadata.get("added", False) and values[item.name] == item.default
            if item.metadata.get("identity", True) and not unchanged:
                flat[f"{name}.{item.name}"] = values[item.name]
    return flat


def misfits(section: str, settings: Any) -> list[tuple[str, str]]:
    """(section.field, message) for every value of the wrong type or out of range; if there is none, for every violated relation."""
    found = []
    for name, kind in hints_of(type(settings)).items():
        value, key = getattr(settings, name), f"{section}.{name}"
        try:
            _adapter(kind).validate_python(value)
        except ValidationError as error:
            found.append((key, f"{key} is {value!r}, expected {expected(kind, error.errors()[0]['type'])}"))
    if found or not hasattr(settings, "relations"):
        return found
    return [(f"{section}.{name}", text) for name, text in settings.relations()]


def check(**sections: Any) -> None:
    """Raise UserError for the first error in these sections."""
    for section, settings in sections.items():
        for _, text in misfits(section, settings):
            raise UserError(text)


def expected(kind: Any, error: str = "") -> str:
    """The expected value of a type, in words; if `error` (a pydantic error type) is a range error, the range."""
    if get_origin(kind) is Annotated:
        plain, *notes = get_args(kind)
        about = next((note.description for note in notes if isinstance(note, FieldInfo) and note.description), "")
        return about if about and error in RANGE_ERRORS else expected(plain)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        return {int: "a list of whole numbers, e.g. [1, 2]", float: "a list of numbers, e.g. [0.2, 0.8]"}.get(
            get_args(kind)[0], "a list of whole numbers or names, e.g. [3, cat]"
        )
    if get_origin(kind) is dict:
        return "lists of values under section.key, e.g. {generate.temperature: [0.9, 1.0]}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def hints_of(settings: Any) -> dict[str, Any]:
    """Field name → type with range."""
    types = get_type_hints(settings, include_extras=True)
    return {item.name: types[item.name] for item in fields(settings)}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
