"""Changes of tenants and their keys in the database, each with an entry in the audit.

The admin API, `octet tenant`, and the files of a tenants' folder all change tenants through this
file. A tenant or key is managed by whatever made it, "api" or "file". What a file manages, only the
file changes, so that the two do not fight; but any key can be revoked at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from sqlalchemy import Connection, Select, select, update

from ..errors import Conflict, InvalidRequest, did_you_mean
from ..store.database import Database
from ..store.schema import AUDIT, KEYS, TENANTS
from ..store.times import timestamp, unix_time
from .files import KeyDigests
from .keys import SCOPES, key_id
from .limits import FIELDS, LimitsError, given_limits, parse_tenants
from .stored import (
    API,
    FILE,
    ManagedBy,
    NewKey,
    Row,
    StoredKey,
    StoredTenant,
    parse_scopes,
    stored_key,
    stored_tenant,
)
from .tenant import Tenant
from .transaction import ROTATE, TenantTransaction, tenant_row

MOST_OVERLAP_S = 90 * 86400.0
T = TypeVar("T")


class AuditEntry(NamedTuple):
    """One change: who made it, and what was changed."""

    id: int
    time: str
    actor: str
    action: str
    tenant: str
    key_id: str | None
    details: dict[str, Any]


class Difference(NamedTuple):
    """A difference between files and database. `changes`: by field, the old and new value."""

    action: Literal["create", "adopt", "change", "delete", "add key", "revoke key"]
    tenant: str
    key_id: str | None = None
    changes: dict[str, tuple[Any, Any]] = {}  # noqa: RUF012 - never changed


class Page(NamedTuple):
    """Some of a list, and whether there are more behind them."""

    items: list[Any]
    has_more: bool


class Administration:
    """Reads and changes tenants and keys. Methods block: call them in a thread.

    `actor`: who makes a change, for the audit. Each method raises `StoreUnavailable`, an `OSError`,
    if the database does not answer, `NotFound` for an unknown tenant or key, and `InvalidRequest`
    or `Conflict` for a change that is not possible; then nothing is changed.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        """`clock`: returns the Unix time."""
        self._database, self._clock = database, clock

    # -- tenants --------------------------------------------------------------------------------

    def tenants(self, after: str = "", limit: int = 100) -> Page:
        """The tenants behind the id `after`, in the order of their ids."""
        found = select(TENANTS).where(TENANTS.c.deleted.is_(None), TENANTS.c.id > after)
        return self._page(found.order_by(TENANTS.c.id), limit, stored_tenant)

    def tenant(self, tenant: str) -> StoredTenant:
        """One tenant."""
        return stored_tenant(self._database.read(partial(tenant_row, tenant=tenant)))

    def create_tenant(self, actor: str, tenant: str, limits: Mapping[str, Any]) -> StoredTenant:
        """Add a tenant with these limits."""
        given = given_limits(_checked(tenant, limits))

        def work(change: TenantTransaction) -> StoredTenant:
            if change.exists(tenant):
                raise Conflict(f"tenant '{tenant}' exists already", param="id")
            change.revoke_all(tenant)  # of a tenant that had this id and was deleted by files
            change.put_tenants({tenant: given}, API)
            change.audit("create tenant", tenant, given)
            return stored_tenant(change.tenant(tenant))

        return self._write(actor, work)

    def change_tenant(self, actor: str, tenant: str, changes: Mapping[str, Any]) -> StoredTenant:
        """Change some limits of a tenant; None takes a limit away."""

        def work(change: TenantTransaction) -> StoredTenant:
            row = change.tenant(tenant)
            _check_managed_by_api(row)
            for name in changes:
                if name not in FIELDS:
                    hint = did_you_mean(name[:80], FIELDS)
                    raise InvalidRequest(f"unknown limit '{name[:80]}': {hint}", param=name[:80])
            merged = {**json.loads(row["limits"]), **changes}
            kept = {name: value for name, value in merged.items() if value is not None}
            # A newer release may have stored limits that this one does not know: they stay.
            _checked(tenant, {name: kept[name] for name in kept if name in FIELDS})
            change.put_tenants({tenant: kept}, API)
            change.audit("change tenant", tenant, changes)
            return stored_tenant(change.tenant(tenant))

        return self._write(actor, work)

    def delete_tenant(self, actor: str, tenant: str) -> StoredTenant:
        """Delete a tenant and revoke its keys; its usage records stay."""

        def work(change: TenantTransaction) -> StoredTenant:
            row = change.tenant(tenant)
            _check_managed_by_api(row)
            change.delete_tenant(tenant)
            return stored_tenant(row)

        return self._write(actor, work)

    # -- keys -----------------------------------------------------------------------------------

    def keys(self, tenant: str | None = None, after: str = "", limit: int = 100) -> Page:
        """The keys that are not revoked, behind the id `after`, in the order of their ids.

        `tenant`: those of this tenant only.
        """
        found = select(KEYS).where(KEYS.c.revoked.is_(None), KEYS.c.id > after)
        if tenant is not None:
            found = found.where(KEYS.c.tenant == tenant)
        return self._page(found.order_by(KEYS.c.id), limit, stored_key)

    def create_key(
        self,
        actor: str,
        tenant: str,
        scopes: Sequence[str] = SCOPES,
        expires: str | None = None,
    ) -> NewKey:
        """Make a key of a tenant. `expires`: an ISO 8601 time; None: never."""
        chosen, until = parse_scopes(scopes), self._expiry(expires)

        def work(change: TenantTransaction) -> NewKey:
            change.tenant(tenant)
            made = change.new_key(tenant, chosen, until)
            change.audit("create key", tenant, _about(made.stored), made.stored.id)
            return made

        return self._write(actor, work)

    def rotate_key(self, actor: str, id: str, overlap_s: float) -> NewKey:
        """Make a key like the one with this id, which stays valid for `overlap_s` seconds more."""
        if not 0 <= overlap_s <= MOST_OVERLAP_S:
            raise InvalidRequest(
                f"overlap_s {overlap_s} must be between 0 and {MOST_OVERLAP_S:g}", param="overlap_s"
            )

        def work(change: TenantTransaction) -> NewKey:
            old = change.key(id)
            if (ends := old["expires"]) is not None and ends <= timestamp(self._clock()):
                raise Conflict(f"key {id} has expired: make another key")
            if successor := change.successor(id):
                raise Conflict(f"key {id} was rotated already: its successor is {successor}")
            made = change.new_key(
                old["tenant"], parse_scopes(old["scopes"].split()), old["expires"]
            )
            ends = timestamp(self._clock() + overlap_s)
            if old["expires"] is None or ends < old["expires"]:
                change.update_key(old, expires=ends)
            change.audit(ROTATE, old["tenant"], {"new": made.stored.id, "ends": ends}, id)
            return made

        return self._write(actor, work)

    def revoke_key(self, actor: str, id: str) -> StoredKey:
        """Revoke a key for ever."""

        def work(change: TenantTransaction) -> StoredKey:
            row = change.key(id)
            change.revoke(row)
            return stored_key({**row, "revoked": timestamp(self._clock())})

        return self._write(actor, work)

    def note_use(self, uses: Mapping[str, float]) -> None:
        """Note when keys were used last: the Unix time by the id of the key."""

        def work(connection: Connection) -> None:
            for id, used in uses.items():
                values = {"last_used": timestamp(used)}
                connection.execute(update(KEYS).where(KEYS.c.id == id).values(values))

        self._database.write(work)

    # -- files and audit ------------------------------------------------------------------------

    def apply(
        self,
        actor: str,
        tenants: Mapping[str, Tenant],
        keys: KeyDigests | None,
        *,
        managed_by: ManagedBy = FILE,
        dry_run: bool = False,
    ) -> list[Difference]:
        """Make what files manage equal to these files; return what that changes.

        Tenants of the files are created or changed, and those that only earlier files had are
        deleted; so are keys. A tenant that the API has made and the files name is managed by the
        files from then on. A revoked key stays revoked. `keys`: None leaves all keys as they are.
        `managed_by`: with "api" the files are only copied: their tenants are managed by the API
        from then on, and nothing is deleted. `dry_run`: change nothing.
        """
        differences = partial(_differences, tenants=tenants, keys=keys, managed_by=managed_by)
        if dry_run:
            return self._database.read(differences)

        def work(change: TenantTransaction) -> list[Difference]:
            found = differences(change.connection)
            digests = {key_id(k["sha256"]): k for owned in (keys or {}).values() for k in owned}
            written, added = {}, list[dict[str, Any]]()
            for action, tenant, id, changes in found:
                if action == "delete":  # if the files name it again, its keys work again
                    change.delete_tenant(tenant, keep_keys=True)
                elif action == "revoke key" and id:
                    change.revoke(change.key(id))
                elif action == "add key" and id:
                    sha256, created = digests[id]["sha256"], self._stored(digests[id]["created"])
                    added.append(change.key_row(tenant, sha256, SCOPES, managed_by, created, None))
                    change.audit(action, tenant, {}, id)
                else:
                    written[tenant] = given_limits(tenants[tenant])
                    change.audit(f"{action} tenant", tenant, changes)
            change.put_tenants(written, managed_by)
            change.add_keys(added)
            return found

        return self._write(actor, work)

    def audit(self, after: int = 0, limit: int = 100, tenant: str | None = None) -> Page:
        """The changes behind the one with the id `after`, in the order in which they were made."""
        found = select(AUDIT).where(AUDIT.c.id > after)
        if tenant is not None:
            found = found.where(AUDIT.c.tenant == tenant)
        return self._page(found.order_by(AUDIT.c.id), limit, _entry)

    # -- the database ---------------------------------------------------------------------------

    def _write(self, actor: str, work: Callable[[TenantTransaction], T]) -> T:
        def transaction(connection: Connection) -> T:
            change = TenantTransaction(connection, actor, timestamp(self._clock()))
            result = work(change)
            change.write_audit()
            return result

        return self._database.write(transaction)

    def _page(self, query: Select[Any], limit: int, item: Callable[[Row], Any]) -> Page:
        rows = self._database.read(lambda c: c.execute(query.limit(limit + 1)).mappings().all())
        return Page([item(row) for row in rows[:limit]], len(rows) > limit)

    def _stored(self, created: str) -> str:
        """A time of a file as it is stored; the present time if it is none."""
        try:
            return timestamp(unix_time(created))
        except (ValueError, OverflowError):
            return timestamp(self._clock())

    def _expiry(self, expires: str | None) -> str | None:
        if expires is None:
            return None
        try:
            until = unix_time(expires)
        except (ValueError, TypeError):
            raise InvalidRequest(
                f"expires_at '{expires}' must be a time such as 2027-01-31T12:00:00Z",
                param="expires_at",
            ) from None
        if until <= self._clock():
            raise InvalidRequest(f"expires_at {expires} is in the past", param="expires_at")
        return timestamp(until)


def _differences(
    connection: Connection,
    tenants: Mapping[str, Tenant],
    keys: KeyDigests | None,
    managed_by: ManagedBy,
) -> list[Difference]:
    """The differences between files and database; see `Administration.apply`."""
    rows = connection.execute(select(TENANTS).where(TENANTS.c.deleted.is_(None))).mappings()
    there = {row["id"]: row for row in rows}
    found = []
    for name, tenant in tenants.items():
        before, after = {}, given_limits(tenant)
        if row := there.get(name):
            before = json.loads(row["limits"])
        changes = {
            field: (before.get(field), after.get(field))
            for field in sorted({*before, *after})
            if before.get(field) != after.get(field)
        }
        if row is None:
            found.append(Difference("create", name, None, changes))
        elif row["managed_by"] != managed_by:
            found.append(Difference("adopt", name, None, changes))
        elif changes:
            found.append(Difference("change", name, None, changes))
    if managed_by == FILE:
        gone = [n for n, row in there.items() if row["managed_by"] == FILE and n not in tenants]
        found += [Difference("delete", name) for name in sorted(gone)]
    if keys is None:
        return found
    columns = KEYS.c.id, KEYS.c.tenant, KEYS.c.managed_by, KEYS.c.revoked
    known = {row.id: row for row in connection.execute(select(*columns))}
    given = {key_id(key["sha256"]): name for name in tenants for key in keys.get(name, ())}
    found += [Difference("add key", name, id) for id, name in given.items() if id not in known]
    if managed_by != FILE:
        return found
    kept = {row.id for row in known.values() if row.managed_by != FILE or row.revoked is not None}
    found += [
        Difference("revoke key", row.tenant, row.id)
        for row in known.values()
        if row.id not in given and row.id not in kept and row.tenant in tenants
    ]
    return found


def _check_managed_by_api(row: Row) -> None:
    if row["managed_by"] == FILE:
        raise Conflict(
            f"tenant '{row['id']}' is managed by tenants.yaml: change it there, and apply the file"
        )


def _checked(tenant: str, limits: Mapping[str, Any]) -> Tenant:
    """The tenant with these limits. Raises `InvalidRequest` if its id or a limit is not valid."""
    try:
        return parse_tenants({tenant: limits})[tenant]
    except LimitsError as error:
        where, what = error.faults[0]
        field = where.removeprefix(f"{tenant}.")
        raise InvalidRequest(f"{field}: {what}", param=field.split(".")[0]) from None


def _about(key: StoredKey) -> dict[str, Any]:
    return {"scopes": list(key.scopes), "expires_at": key.expires}


def _entry(row: Row) -> AuditEntry:
    return AuditEntry(**{**row, "details": json.loads(row["details"])})
