"""One Ray for the whole run, on the demo model, deployed the way `octet serve` deploys."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve import launch
from serve.launch import RunningApplication, run_application
from serve.settings.application import Settings
from serve.settings.file import load_settings

# `serve.launch` sets these too, but Ray reads them when it is imported, and tests import it first.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "demo" / "model"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def replica_logs() -> str:
    """Of every replica that runs on this machine."""
    files = Path(tempfile.gettempdir()).glob("octet-*/ray/session_latest/logs/serve/replica_*.log")
    return "\n".join(file.read_text() for file in files)


def build_with(patch: pytest.MonkeyPatch, import_path: str) -> None:
    """Let what is deployed be made by another `build` than ours."""
    ours = launch.serve_config

    def config(settings: Settings) -> Any:
        found = ours(settings)
        found["applications"][0]["import_path"] = import_path
        return found

    patch.setattr(launch, "serve_config", config)


@pytest.fixture(scope="session")
def laptop() -> Settings:
    """With one replica of each pool, whatever the load."""
    environ = {"OCTET_HTTP__PORT": str(free_port()), "OCTET_MODELS__0__POOLS__0__REPLICAS": "1"}
    return load_settings(ROOT / "examples" / "laptop.yaml", environ)


@pytest.fixture(scope="session")
def octet(laptop: Settings) -> Iterator[RunningApplication]:
    """The application on a Ray of its own; it runs until the last test has ended.

    Its Generators break where `faulty` says so.
    """
    patch = pytest.MonkeyPatch()
    build_with(patch, "tests.integration.faulty:build")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, while it starts
        application = run_application(laptop)
        octet = application.__enter__()
    yield octet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        application.__exit__(None, None, None)
    patch.undo()


@pytest.fixture(scope="session")
def url(octet: RunningApplication) -> str:
    return octet.url
