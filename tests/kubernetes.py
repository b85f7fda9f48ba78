"""Checks of manifests without an API server: kustomize, core schemas and CRDs."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml
from jsonschema import Draft7Validator  # type: ignore[import-untyped]  # it has no types

from . import kuberay_schemas

ROOT = Path(__file__).parents[1]
KUBERNETES = "1.33"
KUBECTL = shutil.which("kubectl")


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """The manifests that `kubectl apply -k` would send.

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
    """Faults for which the API server would refuse `manifest`; unknown fields are faults."""
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
    schemas = json.loads(kuberay_schemas.FILE.read_text())
    return Draft7Validator({"$ref": f"#/definitions/{kind}", **schemas})
