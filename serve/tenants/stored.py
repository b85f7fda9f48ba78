"""Tenants and keys as the database stores them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import RowMapping

from ..errors import InvalidRequest, did_you_mean
from .keys import SCOPES, Scope

ManagedBy = Literal["api", "file"]
API: ManagedBy = "api"
FILE: ManagedBy = "file"
Row = Mapping[str, Any] | RowMapping


class StoredTenant(NamedTuple):
    """A tenant as it is stored. `limits`: the fields of its `Tenant` that are given."""

    id: str
    limits: dict[str, Any]
    managed_by: str
    created: str


class StoredKey(NamedTuple):
    """A key as it is stored, without the key itself; times as `serve.store.times` writes them."""

    id: str
    tenant: str
    scopes: tuple[Scope, ...]
    managed_by: str
    created: str
    expires: str | None
    revoked: str | None
    last_used: str | None


class NewKey(NamedTuple):
    """A new key. `secret`: the key itself, which is kept nowhere."""

    secret: str
    stored: StoredKey


def parse_scopes(given: Sequence[str]) -> tuple[Scope, ...]:
    """The scopes in their usual order. Raises `InvalidRequest` if there is none or a wrong one."""
    for name in given:
        if name not in SCOPES:
            hint = did_you_mean(str(name), SCOPES)
            raise InvalidRequest(f"unknown scope '{name}': {hint}", param="scopes")
    if not given:
        raise InvalidRequest(f"scopes is empty: name some of {', '.join(SCOPES)}", param="scopes")
    return tuple(scope for scope in SCOPES if scope in given)


def stored_tenant(row: Row) -> StoredTenant:
    """The tenant of a row."""
    return StoredTenant(row["id"], json.loads(row["limits"]), row["managed_by"], row["created"])


def stored_key(row: Row) -> StoredKey:
    """The key of a row."""
    values = {name: row[name] for name in StoredKey._fields}
    return StoredKey(**{**values, "scopes": parse_scopes(row["scopes"].split())})
