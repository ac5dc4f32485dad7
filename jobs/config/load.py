"""Builds the run configuration from defaults, preset, file and --set."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from jobs.config.checks import misfits
from jobs.config.schema import SECTIONS, TYPES, WRITTEN, RunConfig, _yaml_files
from jobs.config.yaml_text import DuplicateKey, parse, parse_text, write_text
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import expected, hints_of
from pipelines.sweeping.trials import SWEPT_SECTIONS

PRESETS = Path(__file__).parent / "presets"

YES_NO = {"yes": True, "on": True, "no": False, "off": False}


@dataclass
class _Layers:
    """The merged values, where later layers override earlier ones, and for each key the layer that set it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, origin: str) -> None:
        if key not in TYPES:
            raise UserError(_unknown_key(key, origin))
        section, _, name = key.partition(".")
        if name:
            self.values.setdefault(section, {})[name] = value
        else:
            self.values[section] = value
        self.origins[key] = origin

    def put_file(self, file: "ConfigurationFile") -> None:
        mapping, origin = file.values, file.name
        if mapping is None:
            return
        if not isinstance(mapping, Mapping):
            raise UserError(f"{origin} contains {_shown(mapping)}, expected sections: {', '.join([*SECTIONS, 'seed'])}")
        for section, values in mapping.items():
            if section not in SECTIONS:
                key = str(section)
                nested = mapping.get(key.partition(".")[0])
                if isinstance(nested, Mapping) and key.partition(".")[2] in nested:
                    raise UserError(
                        f"{origin}: {key} is given twice, in section {key.partition('.')[0]} and as {key}", remedy="remove one of them"
                    )
                self.put(key, values, origin)
            elif not isinstance(values, Mapping | None):
                raise UserError(f"{section} in {origin} is {_shown(values)}, expected a section with keys such as {_keys_of(section)[0]}")
            else:
                for name, value in (values or {}).items():
                    self.put(f"{section}.{name}", value, origin)

    def put_assignment(self, text: str) -> None:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            missing = "key" if equals else "value"
            raise UserError(f"--set {text!r} has no {missing}, expected section.key=value, e.g. --set train.batch=128")
        if key in SECTIONS:
            raise UserError(f"--set {key!r} is a section, expected one of its keys: {', '.join(_keys_of(key))}")
        try:
            parsed = parse_text(value) if TYPES.get(key) is str else parse(value)
        except DuplicateKey as error:
            raise UserError(f"--set {text!r}: {error}") from error
        except yaml.YAMLError as error:
            raise UserError(f"--set {text!r} is not a YAML value: {_one_line(error)}") from error
        self.put(key, parsed, "--set")


@dataclass(frozen=True)
class ConfigurationFile:
    """The values of a configuration file. They are kept because a pipe can be read only once."""

    name: str
    values: Any


def load(preset: str | None = None, file: str | ConfigurationFile | None = None, assignments: Sequence[str] = ()) -> RunConfig:
    """The configuration: defaults, overridden by the preset, the YAML file, and each `section.key=value` (YAML values), in this order.

    Raises UserError with one line per fault: the key, the value, its origin, and the allowed values.
    """
    layers = _Layers()
    if preset is not None:
        layers.put_file(_read_yaml(_preset_file(preset), f"preset {preset}"))
    if file is not None:
        layers.put_file(read_file(file) if isinstance(file, str) else file)
    for text in assignments:
        layers.put_assignment(text)
    return _validated(layers)


def read_file(name: str) -> ConfigurationFile:
    """Read a YAML file, or a pipe such as the shell's <(…). Raises UserError if it does not exist or is not YAML."""
    path = Path(name).expanduser()
    if name and path.is_dir() and name not in presets():
        raise UserError(f"--config {name!r} is a directory, expected a YAML file{_nearest(name, _yaml_files(path))}")
    if name and path.exists() and not path.is_dir():
        return _read_yaml(path, name)
    if name in presets():
        raise UserError(f"--config {name!r} is a preset, not a file", remedy=f"use --preset {name}")
    raise UserError(f"--config {name!r} does not exist, expected a YAML file{_nearest(name, _yaml_files(path.parent))}")


def file_as_assignments(file: str | ConfigurationFile) -> list[str]:
    """A configuration file as `section.key=value` texts for `load`, for a job on a cluster that cannot read the file.

    Raises UserError as `load` does for the file's name, syntax and keys.
    """
    layers = _Layers()
    layers.put_file(read_file(file) if isinstance(file, str) else file)
    texts = []
    for key in layers.origins:
        value = _value_at(layers.values, key)
        as_text = TYPES[key] is str and isinstance(value, str)
        texts.append(f"{key}={write_text(value) if as_text else json.dumps(value, ensure_ascii=False)}")
    return texts


def presets() -> list[str]:
    return sorted(one.stem for one in PRESETS.glob("*.yaml"))


def _preset_file(name: str) -> Path:
    if name not in presets():
        hint = "; to load a file use --config" if name.endswith((".yaml", ".yml")) else _nearest(name, presets())
        raise UserError(f"preset {name!r} does not exist, expected one of {', '.join(presets())}{hint}")
    return PRESETS / f"{name}.yaml"


def _read_yaml(path: Path, origin: str) -> ConfigurationFile:
    try:
        return ConfigurationFile(origin, parse(path.read_text(encoding="utf-8")))
    except DuplicateKey as error:
        raise UserError(f"{origin}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{origin} is not YAML: {_one_line(error)}") from error
    except OSError as error:
        raise UserError(f"{origin} can't be read: {error.strerror}", remedy="check the file's permissions") from error


def _validated(layers: _Layers) -> RunConfig:
    faults = []
    for key in layers.origins:
        section, _, name = key.partition(".")
        holder, name = (layers.values[section], name) if name else (layers.values, section)
        given = holder[name] if isinstance(holder[name], list) else [holder[name]]
        if any(isinstance(one, bool) for one in given) and TYPES[key] is not bool and TYPES[key] is not str:
            faults.append(_wrong_value(key, holder[name], layers))  # pydantic would accept true as 1
        holder[name] = _number(holder[name], TYPES[key])
        if key == "sweep.parameters" and isinstance(holder[name], dict):
            for swept, values in holder[name].items():
                if isinstance(values, list):
                    holder[name][swept] = [_number(one, TYPES.get(swept)) for one in values]
    if faults:
        raise UserError("\n".join(faults))
    try:
        config = RunConfig.model_validate(layers.values)
    except ValidationError as error:
        kinds = {".".join(str(part) for part in one["loc"][:2]): one["type"] for one in error.errors()}
        lines = [_wrong_value(key, _value_at(layers.values, key), layers, kind) for key, kind in kinds.items()]
        raise UserError("\n".join(lines)) from error
    written = [key for key in WRITTEN if not _value_at(config.plain(), key).strip()]
    faults = [f"{key} is empty{_origin(key, layers)}, expected an output path; set it, or leave {key} out" for key in written]
    faults = faults or [f"{text}{_origin(key, layers)}" for key, text in misfits(config)] or _sweep_faults(config)
    if faults:
        raise UserError("\n".join(faults))
    return config


def _sweep_faults(config: RunConfig) -> list[str]:
    """The faults of the sweep's grid: the configuration must be valid with each of its values."""
    faults = []
    swept = SWEPT_SECTIONS[config.sweep.over]
    known = [key for key in TYPES if key.startswith(tuple(f"{section}." for section in swept)) and not key.endswith(".path")]
    for key, values in config.sweep.parameters.items():
        if key not in known:
            about = "unknown" if key not in TYPES else f"not swept over {config.sweep.over}"
            allowed = f"expected keys of {' and '.join(swept)} (sweep.over is {config.sweep.over})"
            faults.append(f"sweep.parameters has {key!r}, {about}; {allowed}{_nearest(key, known)}")
            continue
        if not values:
            faults.append(f"sweep.parameters {key} is an empty list, expected at least one value")
        for value in values:
            one = _Layers(config.plain() | {"sweep": {}}, {})
            one.put(key, value, "sweep.parameters")
            try:
                _validated(one)
            except UserError as error:
                faults.append(str(error))
    return faults


def _number(value: Any, kind: Any) -> Any:
    """Convert text such as 1e6 or `off`, which `parse` returns as text, to the number or boolean that `kind` expects."""
    if kind is bool and isinstance(value, str):
        return YES_NO.get(value.lower(), value)
    if kind in (int, float) and isinstance(value, str) and "e" in value.lower():
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if kind is int and number.is_integer() else number
    if get_origin(kind) is list and isinstance(value, list):
        return [_number(one, get_args(kind)[0]) for one in value]
    return value


def _wrong_value(key: str, value: Any, layers: _Layers, error: str = "") -> str:
    """`error`: pydantic's type of the error, which tells a value out of range from one of the wrong type."""
    section, _, name = key.partition(".")
    settings = RunConfig.model_fields[section].annotation
    kind = hints_of(settings)[name] if name and settings is not None else RunConfig.__annotations__[section]
    nearest = _nearest(str(value), get_args(TYPES[key])) if get_origin(TYPES[key]) is Literal else ""
    return f"{key} is {_shown(value)}, expected {expected(kind, error)}{nearest}{_origin(key, layers)}"


def _unknown_key(key: str, origin: str) -> str:
    section, _, name = key.partition(".")
    same_name = [] if name else [one for one in TYPES if one.endswith(f".{section}")]
    nearest = f"; nearest: {', '.join(same_name)}" if same_name else _nearest(key, [*TYPES, *SECTIONS])
    if section in SECTIONS:
        allowed = f"section {section} has {', '.join(one.partition('.')[2] for one in _keys_of(section))}"
    else:
        allowed = f"the sections are {', '.join(SECTIONS)}, and seed"
    return f"{key} is not a known key{nearest} ({allowed}; from {origin})"


def _keys_of(section: str) -> list[str]:
    return [key for key in TYPES if key.startswith(f"{section}.")]


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; nearest: {close[0]}" if close else ""


def _origin(key: str, layers: _Layers) -> str:
    return f" (from {layers.origins[key]})" if key in layers.origins else ""


def _value_at(values: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return values[section][name] if name else values[section]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
