"""Reading the settings file: YAML, whose values `OCTET_*` environment variables override.

A variable's name is `OCTET_` and the keys that lead to the value, joined by double underscores. An
item of a list is named by its position, counted from 0. The variable's value is read as YAML:

    OCTET_HTTP__PORT=9000  OCTET_MODELS__0__DEFAULTS__NUM_INFERENCE_STEPS=20
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import SettingsError
from .application import Settings

ENVIRONMENT_PREFIX = "OCTET_"
NO_SETTINGS = {"OCTET_KEY"}  # the API key that commands send, not a setting
PATHS = (  # keys whose values are paths
    *(
        "models_folder",
        "local_models_folder",
        "compiled_folder",
        "mps_folder",
        "data_folder",
        "usage_folder",
        "tenants_folder",
    ),
    *("signing_key_file", "redis_password_file"),
)


def load_settings(file: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read settings from a YAML file and the environment variables `environ`.

    A relative path in the settings begins at the settings file's folder. Raises `SettingsError`,
    with one line for each fault, if the settings cannot be used.
    """
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{file}: expected keys with values, found {type(data).__name__}")
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in NO_SETTINGS:
            _override(data, name, environ[name])
    _resolve_locations(data, file.resolve().parent)
    data.setdefault("tenants_folder", "tenants")
    _resolve_paths(data, file.resolve().parent)
    if isinstance(data.get("cache"), dict):
        _resolve_paths(data["cache"], file.resolve().parent)
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise SettingsError("\n".join(f"{file}: {line}" for line in _faults(error))) from None


def _override(data: Any, name: str, value: str) -> None:
    """Set the value that the environment variable `name` stands for.

    Raises `SettingsError` if the settings have no such key.
    """
    *path, last = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
    try:
        if [*path, last][0] not in Settings.model_fields:
            raise ValueError(name)
        for step in path:
            data = data[int(step)] if isinstance(data, list) else data.setdefault(step, {})
        data[int(last) if isinstance(data, list) else last] = yaml.safe_load(value)
    except (TypeError, ValueError, IndexError, AttributeError, yaml.YAMLError):
        raise SettingsError(f"{name}: no such key in the settings") from None


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


def _faults(error: ValidationError) -> list[str]:
    """One line for each fault: the key, what is wrong with it, and the value that was found."""
    lines = []
    faults = error.errors()
    for fault in faults:
        place = fault["loc"]
        if any(f["loc"][: len(place)] == place and f["loc"] != place for f in faults):
            continue  # only a consequence of the fault further inside
        where = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, fault["loc"])))
        message = fault["msg"].removeprefix("Value error, ")
        shown = fault["type"] not in ("value_error", "missing")
        value = f" (found {fault['input']!r})" if shown else ""
        lines.append(f"{where + ': ' if where else ''}{message}{value}")
    return lines
