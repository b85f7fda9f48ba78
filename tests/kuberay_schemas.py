"""JSON Schemas of KubeRay's CRDs without their prose, for the tests of manifests.

Write the file again from the CRDs of a KubeRay release (its Helm chart's folder `crds`) with:

    python -m tests.kuberay_schemas helm-chart/kuberay-operator/crds
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_suffix(".json")
KINDS = "RayCluster", "RayService"
PROSE = {"description", "x-kubernetes-validations", "x-kubernetes-map-type"}
WORTH_SHARING = 200  # characters; shorter parts are repeated where they stand


def structure(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of one CRD like the API server applies it: unknown fields are refused.

    Quantities may be numbers as well as strings. CEL rules are left out, because JSON Schema has
    none.
    """
    kept = {key: value for key, value in schema.items() if key not in PROSE}
    if kept.pop("x-kubernetes-int-or-string", False):
        kept.pop("type", None)
        kept["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = kept.pop("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in kept and not open_ended:
        kept.setdefault("additionalProperties", False)
    return _of_parts(kept, structure)


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """One schema for all `schemas`, with references to equal parts that are written only once."""
    seen: Counter[str] = Counter()
    for schema in schemas.values():
        _count(schema, seen)
    definitions: dict[str, Any] = {}
    names: dict[str, str] = {}

    def referring(part: dict[str, Any]) -> dict[str, Any]:
        text = _text(part)
        if seen[text] < 2 or len(text) < WORTH_SHARING:
            return _of_parts(part, referring)
        if text not in names:
            names[text] = f"part-{len(names)}"
            definitions[names[text]] = _of_parts(part, referring)
        return {"$ref": f"#/definitions/{names[text]}"}

    kinds = {kind: _of_parts(schema, referring) for kind, schema in schemas.items()}
    return {"definitions": kinds | definitions}


def _of_parts(
    schema: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """A copy of `schema` with every direct part changed by `change`."""
    changed = dict(schema)
    if "properties" in schema:
        changed["properties"] = {name: change(p) for name, p in schema["properties"].items()}
    for key in "items", "additionalProperties":
        if isinstance(schema.get(key), dict):
            changed[key] = change(schema[key])
    return changed


def _count(schema: dict[str, Any], seen: Counter[str]) -> dict[str, Any]:
    seen[_text(schema)] += 1
    return _of_parts(schema, lambda part: _count(part, seen))


def _text(part: Any) -> str:
    return json.dumps(part, sort_keys=True, separators=(",", ":"))


def _of_crd(file: Path) -> dict[str, Any]:
    crd = yaml.load(file.read_text(), yaml.CSafeLoader)
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = structure(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    del schema["properties"]["status"]  # the operator writes it
    return schema


def main(folder: Path) -> None:
    """Write the schemas of the CRDs in `folder` next to this file."""
    schemas = {kind: _of_crd(folder / f"ray.io_{kind.lower()}s.yaml") for kind in KINDS}
    lines = (f"{json.dumps(n)}:{_text(d)}" for n, d in shared(schemas)["definitions"].items())
    FILE.write_text('{"definitions":{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
