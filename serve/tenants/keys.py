"""API keys: their form, what is kept of them, and which tenant a key belongs to.

A key itself is kept nowhere: `octet tenant` shows it once and keeps its SHA-256. Keys are random,
so nobody can find a key by trying likely ones, as can be done with passwords. A plain digest is
enough.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import NamedTuple

from .tenant import BURST_S, Tenant

KEY = re.compile(r"octet_([a-z0-9-]{1,63})_[0-9a-f]{40}")
KEY_BYTES = 20  # 160 random bits
VALID_KEYS = 2  # keys of one tenant at a time, so that it can move from one to the next
NO_DIGEST = "0" * 64

KeyDigests = dict[
    str, list[dict[str, str]]
]  # by tenant: the digest of each key, and when it was made


class TenantAccess(NamedTuple):
    """The part of a tenant that an Ingress needs.

    `digests`: SHA-256 of its keys, hexadecimal. `request_burst`: requests that may come at once, if
    there is a request rate.
    """

    digests: tuple[str, ...]
    models: tuple[str, ...] | None = None  # None: all models
    timeout_s: float | None = None
    operator: bool = False
    max_requests: int | None = None
    requests_per_s: float | None = None
    request_burst: float = 1.0


TenantDirectory = dict[str, TenantAccess]  # by tenant


def tenant_directory(tenants: Mapping[str, Tenant], keys: KeyDigests) -> TenantDirectory:
    """The access of all tenants, as Ingresses need it."""
    return {
        name: TenantAccess(
            tuple(key["sha256"] for key in keys.get(name, ())),
            tenant.models,
            tenant.timeout_s,
            tenant.operator,
            tenant.max_requests,
            tenant.requests_per_s,
            tenant.request_burst or max((tenant.requests_per_s or 0.0) * BURST_S, 1.0),
        )
        for name, tenant in tenants.items()
    }


def tenant_of(key: str, directory: TenantDirectory) -> str | None:
    """The tenant that a key belongs to; None if the key is not valid.

    Takes the same time in both cases, so that the time tells nothing about valid keys.
    """
    match = KEY.fullmatch(key)
    name = match[1] if match else ""
    access = directory.get(name)
    known = access.digests if access else ()
    given = digest(key)
    same = [
        hmac.compare_digest(given, (*known, NO_DIGEST, NO_DIGEST)[i]) for i in range(VALID_KEYS)
    ]
    return name if any(same) else None


def digest(key: str) -> str:
    """The SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
