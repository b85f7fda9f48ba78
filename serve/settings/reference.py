"""The reference of all settings as Markdown tables, made from the settings classes.

`python -m serve.settings.reference` prints what docs/settings.md holds below its introduction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, get_type_hints

from ..request import ModelLimits
from .application import CatalogueSettings, FrontSettings, LiveSettings, Settings
from .models import LiveModelSettings
from .serve_config import NUMBERS, OF_JOBS

NOTHING = "nothing"
RESTARTS = {  # by the key that holds the changed one
    "models[]": "the model's replicas",
    "models[].pools[]": "the pool's replicas",
    "text_encoders[]": "its replicas",
}
UNITS = {
    "_s": "s",
    "_px": "px",
    "_pixels": "px²",
    "width": "px",
    "height": "px",
    "_gib": "GiB",
    "_mib": "MiB",
    "_bytes": "bytes",
    "_chars": "characters",
    "_cpus": "cores",
    "_gpus": "GPUs",
    "_steps": "steps",
    "_percent": "%",
    "_length": "tokens",
}
EXCEPTIONS = {
    **dict.fromkeys(("models", "pools", "text_encoders"), "what changes"),
    **dict.fromkeys(("emulate_fp8", "compiled_folder"), "pools"),
    "autoscaling_policy": "every replica",
    "job_runner": "Jobs",
}


class Setting(NamedTuple):
    """One setting; `restarts`: the processes that a change of the setting restarts."""

    key: str
    type: str
    default: str
    unit: str
    meaning: str
    restarts: str


def groups() -> dict[str, list[Setting]]:
    """The settings by the key that holds them, such as `models[].pools[]`; "" is the top level."""
    schema = Settings.model_json_schema()
    found: dict[str, list[Setting]] = {}
    for group, restarts, part in _groups(schema, schema["$defs"]):
        required = part.get("required", ())
        found[group] = [
            Setting(
                name,
                _type(value, schema["$defs"]),
                "required" if name in required else _default(value),
                next((unit for end, unit in UNITS.items() if name.endswith(end)), ""),
                _meaning(value, schema["$defs"]).replace("|", "\\|"),
                NOTHING if name in NUMBERS else restarts or _restarts(group, name),
            )
            for name, value in part["properties"].items()
        ]
    return found


def reference() -> str:
    """A Markdown table for each group of settings."""
    lines: list[str] = []
    for group, settings in groups().items():
        lines += [f"## `{group}`" if group else "## The top level", ""]
        lines += ["| key | type | default | unit | meaning | a change restarts |", "|---" * 6 + "|"]
        for setting in settings:
            cells = setting._replace(key=f"`{setting.key}`")
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
        lines.append("")
    return "\n".join(lines)


def _groups(
    part: dict[str, Any], definitions: dict[str, Any], group: str = "", restarts: str = ""
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each group of settings: its key, what a change in it restarts, and its schema.

    `part`: the schema of the group `group`. `definitions`: the schemas that `$ref` refers to.
    `restarts` is empty if the keys of a group differ in what they restart.
    """
    if part.get("title") == ModelLimits.__name__:
        part = _with_descriptions_of_limits(part)
    yield group, restarts, part
    for name, value in part["properties"].items():
        for inner, suffix in _inner(value, definitions):
            key = f"{group}.{name}{suffix}" if group else f"{name}{suffix}"
            changed = "" if key in RESTARTS else restarts or _restarts(group, name)
            yield from _groups(inner, definitions, key, changed)


def _inner(
    value: dict[str, Any], definitions: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the schema of the keys below a setting, and `[]` if the setting is a list of them.

    For a setting whose keys are names it is `.NAME`.

    `value`: the setting's own schema. A setting without keys below it yields nothing.
    """
    options = [value, *value.get("anyOf", ())]
    for option in options:
        for reference, suffix in (
            (option.get("$ref"), ""),
            (option.get("items", {}).get("$ref"), "[]"),
            (_by_name(option).get("$ref"), ".NAME"),
        ):
            if reference and "enum" not in _defined(reference, definitions):
                yield _defined(reference, definitions), suffix


def _defined(reference: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema that a `$ref` refers to."""
    found: dict[str, Any] = definitions[reference.rpartition("/")[2]]
    return found


def _by_name(option: dict[str, Any]) -> dict[str, Any]:
    """The schema of the values of a setting whose keys are names; {} for any other setting."""
    found: dict[str, Any] = next(iter(option.get("patternProperties", {}).values()), {})
    return found


def _meaning(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A setting's description.

    pydantic leaves a description out if it equals that of the setting's class; then the class's is
    taken.
    """
    texts = [value.get("description")]
    texts += [inner["description"] for inner, _ in _inner(value, definitions)]
    return " ".join(next(filter(None, texts)).split())


def _with_descriptions_of_limits(part: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(ModelLimits, include_extras=True)
    return part | {
        "properties": {
            name: value | {"description": hints[name].__metadata__[0], "exclusiveMinimum": 0}
            for name, value in part["properties"].items()
        }
    }


def _restarts(group: str, name: str) -> str:
    """The processes that a change of a key restarts.

    `group`: the key that holds it, "" for the top level. The class that declares the key decides.
    """
    if name in LiveModelSettings.model_fields:
        return NOTHING
    if group:
        return EXCEPTIONS.get(name, RESTARTS[group])
    for part, restarts in (
        (LiveSettings, NOTHING),
        (FrontSettings, "Ingresses and Dispatcher"),
        (CatalogueSettings, "pools and text encoders"),
    ):
        if name in part.model_fields:
            if part is FrontSettings and name in OF_JOBS:
                restarts = "Ingresses, Dispatcher, Jobs"
            return EXCEPTIONS.get(name, restarts)
    return "`octet serve`"


def _type(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The type of a setting with its bounds, in words."""
    options = [o for o in value.get("anyOf", [value]) if o.get("type") != "null"]
    (option,) = options
    if "$ref" in option:
        option = _defined(option["$ref"], definitions)
    if "enum" in option:
        return ", ".join(f"`{one}`" for one in option["enum"])
    if "properties" in option:
        return "keys below"
    if _by_name(option):
        return "keys below, by name"
    if option["type"] == "array":
        least = " of one or more" if option.get("minItems") else ""
        inner = "keys below" if "$ref" in option["items"] else "text"
        return f"list{least}: {inner}"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
    bounds = [
        f"{sign} {option[key]:g}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in option
    ]
    return " ".join([names[option["type"]], ", ".join(bounds)]).strip()


def _default(value: dict[str, Any]) -> str:
    if value["default"] and isinstance(value["default"], dict):
        return "as below"
    return f"`{json.dumps(value['default'])}`"


if __name__ == "__main__":
    print(reference())  # noqa: T201 - this is a command
