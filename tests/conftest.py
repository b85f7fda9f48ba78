"""Fixtures of tests in several folders, and Ray's authentication for all of them."""

from __future__ import annotations

import os
import secrets
import tempfile

import pytest

from serve.settings.application import Settings

from .builders import laptop_settings
from .ports import free_port

# The tests' servers speak plain HTTP. Without this, each HTTP client would first read all of the
# machine's certificates, which takes 25 ms.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)

# Nothing of a test stays in the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="tests-of-octet-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# `serve.launch` sets these too, but Ray reads them when it is imported, and tests import it first.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture(scope="session")
def laptop() -> Settings:
    """The demo's settings with a fixed number of one replica per pool."""
    return laptop_settings(
        {
            "OCTET_HTTP__PORT": str(free_port()),
            "OCTET_MODELS__0__POOLS__0__REPLICAS": "1",
            "OCTET_MODELS__0__POOLS__1__MIN_REPLICAS": "1",
        }
    )
