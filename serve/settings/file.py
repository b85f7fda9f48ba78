"""Reading the settings file: YAML, whose values `OCTET_*` environment variables override.

A variable's name is `OCTET_` and the keys that lead to the value, joined by double underscores. An
item of a list is named by its position, counted from 0. The variable's value is read as YAML:

    OCTET_HTTP__PORT=9000  OCTET_MODELS__0__DEFAULTS__NUM_INFERENCE_STEPS=20
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import SettingsError
from .application import Settings

Place = tuple[str | int, ...]  # the keys and positions that lead to a value

ENVIRONMENT_PREFIX = "OCTET_"
NO_SETTINGS = {"OCTET_KEY"}  # the API key that commands send, not a setting
PATHS = (  # keys whose values are paths
    *(
        "models_folder",
        "local_models_folder",
        "compiled_folder",
        "mps_folder",
        "data_folder",
        "tenants_folder",
    ),
    *("signing_key_file", "redis_password_file", "password_file"),
)


def load_settings(file: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read settings from a YAML file and the environment variables `environ`.

    A relative path in the settings begins at the settings file's folder. Raises `SettingsError`,
    with one line for each fault, if the settings cannot be used.
    """
    text = _text(file)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{file}{_yaml_fault(error, text)}") from None
    if data is None:
        raise SettingsError(f"{file}: the file is empty; examples/laptop.yaml is a complete one")
    if not isinstance(data, dict):
        raise SettingsError(f"{file}: expected keys with values, found {type(data).__name__}")
    variables = {_override(data, name, environ[name]): name for name in _variables(environ)}
    _resolve_locations(data, file.resolve().parent)
    _resolve_paths(data, file.resolve().parent)
    for part in ("cache", "store"):
        if isinstance(data.get(part), dict):
            _resolve_paths(data[part], file.resolve().parent)
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise SettingsError("\n".join(_faults(error, str(file), variables))) from None


def changed_values(
    file: Path, environ: Mapping[str, str] = os.environ
) -> list[tuple[str, object, str]]:
    """The values of valid settings that differ from their defaults.

    Each comes with its key, such as `models[0].limits.max_steps`, and where it is set: `FILE:LINE`,
    or an environment variable. Raises the errors of `load_settings`.
    """
    settings, text = load_settings(file, environ), _text(file)
    lines = _lines(yaml.compose(text), ())
    origins = {place: f"{file}:{line}" for place, line in lines.items()}
    data = yaml.safe_load(text)
    origins |= {_override(data, name, environ[name]): name for name in _variables(environ)}
    return list(_changed(settings, (), origins))


def _changed(
    part: Any, place: Place, origins: Mapping[Place, str]
) -> Iterator[tuple[str, object, str]]:
    for name, default in _defaults(part).items():
        value, here = getattr(part, name), (*place, name)
        if value == default:
            continue
        items = value if isinstance(value, tuple) else ()
        if isinstance(value, BaseModel) or is_dataclass(value):
            yield from _changed(value, here, origins)
        elif items and all(isinstance(item, BaseModel) for item in items):
            for i, item in enumerate(items):
                yield from _changed(item, (*here, i), origins)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from _changed(item, (*here, key), origins)
        elif origin := _nearest(here, origins):
            yield _key(here), value, origin


def _defaults(part: Any) -> dict[str, object]:
    """The default of each field of a part of the settings."""
    if isinstance(part, BaseModel):
        fields_of = type(part).model_fields.items()
        return {name: field.get_default(call_default_factory=True) for name, field in fields_of}
    return {field.name: field.default for field in fields(part)}


def _nearest(place: Place, origins: Mapping[Place, str]) -> str:
    """Where a value is set, or else the value around it; "" if neither is set anywhere."""
    found = (origins.get(place[:n]) for n in range(len(place), 0, -1))
    return next((origin for origin in found if origin), "")


def _lines(node: Any, place: Place) -> dict[Place, int]:
    """The line of each value in a YAML document, counted from 1."""
    lines = {place: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines |= _lines(value, (*place, key.value))
            lines[(*place, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines |= _lines(value, (*place, i))
    return lines


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: not UTF-8 at byte {error.start}") from None


def _yaml_fault(error: yaml.YAMLError, text: str) -> str:
    """Where a file is no YAML, and why: line and column, and a caret under the place."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f": not YAML: {' '.join(str(error).split())}"
    line = [*text.splitlines(), ""][min(mark.line, len(text.splitlines()))]
    problem = getattr(error, "problem", "") or "wrong"
    return (
        f":{mark.line + 1}:{mark.column + 1}: not YAML: {problem}\n"
        f"    {line}\n    {' ' * mark.column}^"
    )


def _variables(environ: Mapping[str, str]) -> list[str]:
    """The names of the environment variables that override settings."""
    return sorted(
        name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and name not in NO_SETTINGS
    )


def _override(data: Any, name: str, value: str) -> Place:
    """Set the value that the environment variable `name` stands for; returns its place.

    Raises `SettingsError` if the settings have no such key.
    """
    place: list[str | int] = []
    *path, last = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
    try:
        if [*path, last][0] not in Settings.model_fields:
            raise ValueError(name)
        for step in path:
            place.append(int(step) if isinstance(data, list) else step)
            data = data[int(step)] if isinstance(data, list) else data.setdefault(step, {})
        place.append(int(last) if isinstance(data, list) else last)
        data[place[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SettingsError(f"{name}: '{value}' is not YAML") from None
    except (TypeError, ValueError, IndexError, AttributeError):
        raise SettingsError(f"{name}: no such key in the settings") from None
    return tuple(place)


def _resolve_paths(part: dict[str, Any], folder: Path) -> None:
    """Make the relative paths in `part` absolute; they begin at `folder`.

    A path with ~ stays as it is, because each node resolves ~ itself.
    """
    for key in PATHS:
        if isinstance(part.get(key), str) and not part[key].startswith("~"):
            part[key] = str(folder / part[key])


def _resolve_locations(data: Any, folder: Path) -> None:
    """Make each `location` that names an existing folder absolute.

    A relative location begins at `folder`, the settings file's folder. Any other location is an id
    on the hub, and stays as it is.
    """
    if isinstance(data, list):
        for item in data:
            _resolve_locations(item, folder)
    elif isinstance(data, dict):
        location = data.get("location")
        if isinstance(location, str) and (folder / location).is_dir():
            data["location"] = str((folder / location).resolve())
        for item in data.values():
            _resolve_locations(item, folder)


def _key(place: Place) -> str:
    """A place as people write it, such as `models[0].limits`."""
    return re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, place)))


def _faults(error: ValidationError, file: str, variables: Mapping[Place, str]) -> list[str]:
    """One line for each fault: the key, what is wrong with it, and the value that was found.

    A line begins with the `file`, or with the environment variable that has set the value.
    """
    lines = []
    faults = error.errors()
    for fault in faults:
        place = fault["loc"]
        if any(f["loc"][: len(place)] == place and f["loc"] != place for f in faults):
            continue  # only a consequence of the fault further inside
        where = _key(place)
        source = next((v for p, v in variables.items() if place[: len(p)] == p), "")
        if not source:  # a part may be wrong because of a value inside it
            inside = (v for p, v in variables.items() if place and p[: len(place)] == place)
            source = " or ".join([file, *inside])
        message = fault["msg"].removeprefix("Value error, ")
        shown = fault["type"] not in ("value_error", "missing")
        value = f" (found {fault['input']!r})" if shown else ""
        lines.append(f"{source}: {where + ': ' if where else ''}{message}{value}")
    return lines
