"""Tenants with keys in a database, for measurements and tests."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from serve.store.database import Database
from serve.tenants.administration import Administration


def add_tenants(
    database: Mapping[str, Any], tenants: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Add tenants with these limits; return a key of each. `database`: its arguments."""
    with closing(Database(**database)) as opened:
        administration = Administration(opened, time.time)
        for name, limits in tenants.items():
            administration.create_tenant("bench", name, limits)
        return {name: administration.create_key("bench", name).secret for name in tenants}
