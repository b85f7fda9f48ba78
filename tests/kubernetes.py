"""Manifests as an API server would see them, without one: kustomize, core schemas, CRDs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).parents[1]
KUBERNETES = "1.33"
KUBECTL = shutil.which("kubectl")
CRDS = Path(os.environ.get("KUBERAY_CRDS") or ROOT.parent / "shared" / "schemas")


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send.

    Skips the test where there is no kubectl, unless the environment requires it.
    """
    if KUBECTL is None:
        if os.environ.get("REQUIRE_SERVERS"):
            pytest.fail("kubectl is not installed")
        pytest.skip("kubectl is not installed")
    command = [KUBECTL, "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def faults(manifest: dict[str, Any]) -> list[str]:
    """Unknown fields are faults. Skips the test where KubeRay's CRDs are needed and not there."""
    if manifest["apiVersion"].startswith("ray.io/"):
        errors = _kuberay(manifest["kind"]).iter_errors(manifest)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error.message)]
    return []


@functools.cache
def _kuberay(kind: str) -> Draft7Validator:
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        if os.environ.get("REQUIRE_SERVERS"):
            pytest.fail(f"{file} is not there")
        pytest.skip(f"{file} is not there: KUBERAY_CRDS names the folder of KubeRay's CRDs")
    crd = yaml.load(file.read_text(), yaml.CSafeLoader)
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    metadata = schema["properties"].pop("metadata")
    _strict(schema)
    schema["properties"]["metadata"] = metadata
    return Draft7Validator(schema)


def _strict(schema: Any) -> None:
    """As the API server takes a schema: numbers for quantities, and nothing that is not named."""
    if isinstance(schema, list):
        for part in schema:
            _strict(part)
    if not isinstance(schema, dict):
        return
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not open_ended:
        schema.setdefault("additionalProperties", False)
    for part in schema.values():
        _strict(part)
