"""The rows of tenants, keys and audit that one change writes."""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, bindparam, insert, or_, select, update

from ..errors import Conflict, NotFound, did_you_mean
from ..store.schema import AUDIT, KEYS, TENANTS, next_numbers
from .keys import KEY_BYTES, Scope, digest, key_id
from .stored import API, NewKey, Row, stored_key

ROTATE = "rotate key"  # in the audit
MOST_KEYS = 100  # valid ones of a tenant
FEW = 500  # tenants that a statement names


class TenantTransaction:
    """A transaction that changes tenants and keys, with its entries in the audit."""

    def __init__(self, connection: Connection, actor: str, now: str) -> None:
        """`actor`: who makes the change. `now`: the transaction's time, as it is stored."""
        self.connection, self._actor, self._now = connection, actor, now
        self._entries: list[dict[str, Any]] = []  # of the audit

    @functools.cached_property
    def _number(self) -> int:
        """The number of this change, by which Dispatchers find the rows that it writes."""
        return next_numbers(self.connection, TENANTS.name) + 1

    def tenant(self, tenant: str) -> Row:
        """The row of a tenant that exists. Raises `NotFound`."""
        return tenant_row(self.connection, tenant)

    def exists(self, tenant: str) -> bool:
        """Return whether there is such a tenant."""
        found = select(TENANTS.c.id).where(TENANTS.c.id == tenant, TENANTS.c.deleted.is_(None))
        return self.connection.execute(found).first() is not None

    def put_tenants(self, limits: Mapping[str, Mapping[str, Any]], managed_by: str) -> None:
        """Write the limits of tenants, whether or not they exist or have existed."""
        if not limits:
            return
        found = select(TENANTS.c.id, TENANTS.c.created, TENANTS.c.deleted)
        if len(limits) <= FEW:  # else reading all is simpler than naming so many
            found = found.where(TENANTS.c.id.in_(limits))
        before = {row.id: row for row in self.connection.execute(found)}
        rows = []
        for name, given in limits.items():
            old = before.get(name)
            created = old.created if old and old.deleted is None else self._now
            rows.append(
                {
                    "name": name,
                    "limits": json.dumps(given),
                    "managed_by": managed_by,
                    "created": created,
                    "deleted": None,
                    "changed": self._number,
                }
            )
        if fresh := [{"id": row.pop("name"), **row} for row in rows if row["name"] not in before]:
            self.connection.execute(insert(TENANTS), fresh)
        if known := [row for row in rows if "name" in row]:
            there = TENANTS.c.id == bindparam("name")
            self.connection.execute(update(TENANTS).where(there), known)

    def delete_tenant(self, tenant: str, *, keep_keys: bool = False) -> None:
        """Mark a tenant as deleted, so that its keys do not work, and revoke them."""
        if not keep_keys:
            self.revoke_all(tenant)
        values = {"deleted": self._now, "changed": self._number}
        self.connection.execute(update(TENANTS).where(TENANTS.c.id == tenant).values(values))
        self.audit("delete tenant", tenant, {})

    def key(self, id: str) -> Row:
        """The row of a key that is not revoked. Raises `NotFound`."""
        found = select(KEYS).where(KEYS.c.id == id, KEYS.c.revoked.is_(None))
        row = self.connection.execute(found).mappings().first()
        if row is None:
            raise NotFound(f"no valid key has the id '{id[:80]}'")
        return row

    def successor(self, id: str) -> str | None:
        """The id of the key that has replaced this one; None if none has."""
        found = select(AUDIT.c.details).where(AUDIT.c.key_id == id, AUDIT.c.action == ROTATE)
        row = self.connection.execute(found).first()
        return json.loads(row.details)["new"] if row else None

    def new_key(self, tenant: str, scopes: Sequence[Scope], expires: str | None) -> NewKey:
        """Make a random key. Raises `Conflict` if the tenant has too many."""
        unexpired = or_(KEYS.c.expires.is_(None), KEYS.c.expires > self._now)
        if len(self.connection.execute(valid_keys(tenant).where(unexpired)).all()) >= MOST_KEYS:
            raise Conflict(f"tenant '{tenant}' has {MOST_KEYS} keys: revoke some first")
        secret = f"octet_{tenant}_{secrets.token_hex(KEY_BYTES)}"
        row = self.key_row(tenant, digest(secret), scopes, API, self._now, expires)
        self.add_keys([row])
        return NewKey(secret, stored_key(row))

    def key_row(
        self,
        tenant: str,
        sha256: str,
        scopes: Sequence[Scope],
        managed_by: str,
        created: str,
        expires: str | None,
    ) -> dict[str, Any]:
        """The row of a new key."""
        return {
            "id": key_id(sha256),
            "tenant": tenant,
            "sha256": sha256,
            "scopes": " ".join(scopes),
            "managed_by": managed_by,
            "created": created,
            "expires": expires,
            "revoked": None,
            "last_used": None,
            "changed": self._number,
        }

    def add_keys(self, rows: list[dict[str, Any]]) -> None:
        """Write new keys."""
        if rows:
            self.connection.execute(insert(KEYS), rows)

    def update_key(self, row: Row, **values: Any) -> None:
        """Change columns of a key."""
        values["changed"] = self._number
        self.connection.execute(update(KEYS).where(KEYS.c.id == row["id"]).values(values))

    def revoke(self, row: Row) -> None:
        """Revoke a key."""
        self.update_key(row, revoked=self._now)
        self.audit("revoke key", row["tenant"], {}, row["id"])

    def revoke_all(self, tenant: str) -> None:
        """Revoke all keys of a tenant."""
        for row in self.connection.execute(valid_keys(tenant)).mappings().all():
            self.revoke(row)

    def audit(
        self, action: str, tenant: str, details: Mapping[str, Any], id: str | None = None
    ) -> None:
        """Add an entry to the audit. `id`: of the key that was changed."""
        self._entries.append(
            {
                "time": self._now,
                "actor": self._actor[:200],
                "action": action,
                "tenant": tenant,
                "key_id": id,
                "details": json.dumps(details),
            }
        )

    def write_audit(self) -> None:
        """Write the entries of the audit, at the end of the transaction."""
        if self._entries:
            before = next_numbers(self.connection, AUDIT.name, len(self._entries))
            rows = [{"id": id, **entry} for id, entry in enumerate(self._entries, before + 1)]
            self.connection.execute(insert(AUDIT), rows)


def valid_keys(tenant: str) -> Select[Any]:
    """The query for a tenant's keys that are not revoked."""
    return select(KEYS).where(KEYS.c.tenant == tenant, KEYS.c.revoked.is_(None))


def tenant_row(connection: Connection, tenant: str) -> Row:
    """The row of a tenant that exists. Raises `NotFound`."""
    found = select(TENANTS).where(TENANTS.c.id == tenant, TENANTS.c.deleted.is_(None))
    row = connection.execute(found).mappings().first()
    if row is None:
        names = connection.execute(
            select(TENANTS.c.id).where(TENANTS.c.deleted.is_(None)).limit(1000)
        ).scalars()
        hint = did_you_mean(tenant, list(names))
        near = f": {hint}" if hint.startswith("did you mean") else ""
        raise NotFound(f"tenant '{tenant[:80]}' does not exist{near}")
    return row
