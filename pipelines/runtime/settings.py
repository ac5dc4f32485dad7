"""How a stage's settings are written down: plain dataclasses whose every field is either *identity* (it changes what is
computed: a resume with another value is refused) or *operational* (it changes how: workers, cadence, cluster, length).

A field's range stands in its type, e.g. `batch: Count`, and pydantic checks it. Rules between fields of one section stand in its method
`relations`, which yields (field, what is wrong).
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


def misfits(section: str, settings: Any) -> list[tuple[str, str]]:
    """(section.field, what is wrong) for every value of the wrong type or out of its range; where there is none, for the relations."""
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
    """Raise UserError for the first misfit of these sections."""
    for section, settings in sections.items():
        for _, text in misfits(section, settings):
            raise UserError(text)


def expected(kind: Any, error: str = "") -> str:
    """What a value of this type has to be; of one that is out of its range (pydantic's type of `error`), the range."""
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
    """field → its type, with its range."""
    known = get_type_hints(settings, include_extras=True)
    return {one.name: known[one.name] for one in fields(settings)}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
