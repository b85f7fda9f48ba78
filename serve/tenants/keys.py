"""API keys: their form, what is kept of them, and which tenant a key belongs to.

A key itself is kept nowhere: it is shown once, and its SHA-256 is kept. Keys are random, so nobody
can find a key by trying likely ones, as can be done with passwords. A plain digest is enough.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

from .tenant import BURST_S, Tenant

KEY = re.compile(r"octet_([a-z0-9-]{1,63})_[0-9a-f]{40}")  # the group is the tenant
KEY_BYTES = 20  # 160 random bits
ID_CHARS = 12  # of a key's SHA-256, which are its id

Scope = Literal["generate", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class ApiKey(NamedTuple):
    """A valid key of a tenant. `sha256`: hexadecimal. `expires`: in Unix time; None: never.

    `scopes`: what it may be used for: "generate" asks for images and cancels them, "read" lists
    models and reads the state of requests, "admin" calls the operators' paths if the tenant is an
    operator.
    """

    sha256: str
    scopes: tuple[Scope, ...] = SCOPES
    expires: float | None = None

    @property
    def id(self) -> str:
        return key_id(self.sha256)


class TenantAccess(NamedTuple):
    """The part of a tenant that an Ingress needs.

    `request_burst`: requests that may come at once, if there is a request rate.
    """

    keys: tuple[ApiKey, ...]
    models: tuple[str, ...] | None = None  # None: all models
    timeout_s: float | None = None
    operator: bool = False
    max_requests: int | None = None
    requests_per_s: float | None = None
    request_burst: float = 1.0


class TenantChanges(NamedTuple):
    """Changed tenants: their access, or None for a tenant that may not call any more.

    `whole`: these are all tenants, and there are no others.
    """

    tenants: dict[str, TenantAccess | None]
    whole: bool = False


class KeyOwner(NamedTuple):
    """The tenant of a valid key."""

    tenant: str
    key: ApiKey


class TenantDirectory:
    """The access of all tenants, and their keys, at one Ingress."""

    def __init__(self) -> None:
        self._tenants: dict[str, TenantAccess] = {}
        self._owners: dict[str, KeyOwner] = {}  # by the SHA-256 of the key

    def change(self, changes: TenantChanges) -> None:
        """Apply changed tenants."""
        removed = {*self._tenants, *changes.tenants} if changes.whole else set(changes.tenants)
        for name in removed:
            if before := self._tenants.pop(name, None):
                for key in before.keys:
                    self._owners.pop(key.sha256, None)
        for name, access in changes.tenants.items():
            if access:
                self._tenants[name] = access
                self._owners |= {key.sha256: KeyOwner(name, key) for key in access.keys}

    def get(self, tenant: str) -> TenantAccess | None:
        """The access of a tenant; None if there is no such tenant."""
        return self._tenants.get(tenant)

    def owner(self, key: str, now: float) -> KeyOwner | None:
        """The owner of a key at the Unix time `now`; None if the key is not valid.

        Nothing is compared with the key itself, only its digest is looked up. So the time that it
        takes tells nothing about valid keys.
        """
        found = self._owners.get(digest(key)) if KEY.fullmatch(key) else None
        if found and found.key.expires is not None and found.key.expires <= now:
            return None
        return found


def access_of(tenant: Tenant, keys: Iterable[ApiKey]) -> TenantAccess:
    """The access of a tenant with these keys, as Ingresses need it."""
    return TenantAccess(
        tuple(keys),
        tenant.models,
        tenant.timeout_s,
        tenant.operator,
        tenant.max_requests,
        tenant.requests_per_s,
        tenant.request_burst or max((tenant.requests_per_s or 0.0) * BURST_S, 1.0),
    )


def all_access(
    tenants: Mapping[str, Tenant], keys: Mapping[str, Iterable[ApiKey]]
) -> dict[str, TenantAccess | None]:
    """The access of all these tenants; `keys`: by tenant."""
    return {name: access_of(tenant, keys.get(name, ())) for name, tenant in tenants.items()}


def digest(key: str) -> str:
    """The SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def key_id(sha256: str) -> str:
    """The id of the key with this SHA-256. It is no secret."""
    return sha256[:ID_CHARS]
