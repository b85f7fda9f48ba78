"""Changes of tenants and their keys in the database, each with an entry in the audit.

The admin API, `octet tenant`, and the files of a tenants' folder all change tenants through this
file. A tenant or key is managed by whatever made it, "api" or "file". What a file manages, only the
file changes, so that the two do not fight; but any key can be revoked at any time.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from sqlalchemy import Connection, RowMapping, Select, bindparam, insert, or_, select, update

from ..errors import Conflict, InvalidRequest, NotFound, did_you_mean
from ..store.database import Database
from ..store.schema import AUDIT, KEYS, TENANTS, next_numbers
from ..store.times import timestamp, unix_time
from .files import KeyDigests
from .keys import KEY_BYTES, SCOPES, Scope, digest, key_id
from .limits import FIELDS, LimitsError, given_limits, parse_tenants
from .tenant import Tenant

ManagedBy = Literal["api", "file"]
API: ManagedBy = "api"
FILE: ManagedBy = "file"
ROTATE = "rotate key"  # in the audit
MOST_KEYS = 100  # valid ones of a tenant
MOST_OVERLAP_S = 90 * 86400.0
Row = Mapping[str, Any] | RowMapping
T = TypeVar("T")


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
    """What applying a file changes in one place. `changes`: by field, the old and new value."""

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
        return self._page(found.order_by(TENANTS.c.id), limit, _tenant)

    def tenant(self, tenant: str) -> StoredTenant:
        """One tenant."""
        return _tenant(self._database.read(partial(_tenant_row, tenant=tenant)))

    def create_tenant(self, actor: str, tenant: str, limits: Mapping[str, Any]) -> StoredTenant:
        """Add a tenant with these limits."""
        given = given_limits(_checked(tenant, limits))

        def work(change: _Change) -> StoredTenant:
            if change.exists(tenant):
                raise Conflict(f"tenant '{tenant}' exists already", param="id")
            change.revoke_all(tenant)  # of a tenant that had this id and was deleted by files
            change.put_tenants({tenant: given}, API)
            change.audit("create tenant", tenant, given)
            return _tenant(change.tenant(tenant))

        return self._write(actor, work)

    def change_tenant(self, actor: str, tenant: str, changes: Mapping[str, Any]) -> StoredTenant:
        """Change some limits of a tenant; None takes a limit away."""

        def work(change: _Change) -> StoredTenant:
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
            return _tenant(change.tenant(tenant))

        return self._write(actor, work)

    def delete_tenant(self, actor: str, tenant: str) -> StoredTenant:
        """Delete a tenant and revoke its keys; its usage records stay."""

        def work(change: _Change) -> StoredTenant:
            row = change.tenant(tenant)
            _check_managed_by_api(row)
            change.delete_tenant(tenant)
            return _tenant(row)

        return self._write(actor, work)

    # -- keys -----------------------------------------------------------------------------------

    def keys(self, tenant: str | None = None, after: str = "", limit: int = 100) -> Page:
        """The keys that are not revoked, behind the id `after`, in the order of their ids.

        `tenant`: those of this tenant only.
        """
        found = select(KEYS).where(KEYS.c.revoked.is_(None), KEYS.c.id > after)
        if tenant is not None:
            found = found.where(KEYS.c.tenant == tenant)
        return self._page(found.order_by(KEYS.c.id), limit, _key)

    def create_key(
        self,
        actor: str,
        tenant: str,
        scopes: Sequence[str] = SCOPES,
        expires: str | None = None,
    ) -> NewKey:
        """Make a key of a tenant. `expires`: an ISO 8601 time; None: never."""
        chosen, until = _scopes(scopes), self._expiry(expires)

        def work(change: _Change) -> NewKey:
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

        def work(change: _Change) -> NewKey:
            old = change.key(id)
            if (ends := old["expires"]) is not None and ends <= timestamp(self._clock()):
                raise Conflict(f"key {id} has expired: make another key")
            if successor := change.successor(id):
                raise Conflict(f"key {id} was rotated already: its successor is {successor}")
            made = change.new_key(old["tenant"], _scopes(old["scopes"].split()), old["expires"])
            ends = timestamp(self._clock() + overlap_s)
            if old["expires"] is None or ends < old["expires"]:
                change.update_key(old, expires=ends)
            change.audit(ROTATE, old["tenant"], {"new": made.stored.id, "ends": ends}, id)
            return made

        return self._write(actor, work)

    def revoke_key(self, actor: str, id: str) -> StoredKey:
        """Revoke a key for ever."""

        def work(change: _Change) -> StoredKey:
            row = change.key(id)
            change.revoke(row)
            return _key({**row, "revoked": timestamp(self._clock())})

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

        def work(change: _Change) -> list[Difference]:
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

    def _write(self, actor: str, work: Callable[[_Change], T]) -> T:
        def transaction(connection: Connection) -> T:
            change = _Change(connection, actor, timestamp(self._clock()))
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


class _Change:
    """A transaction that changes tenants and keys. `now`: its time, as it is stored."""

    def __init__(self, connection: Connection, actor: str, now: str) -> None:
        self.connection, self._actor, self._now = connection, actor, now
        self._entries: list[dict[str, Any]] = []  # of the audit

    @functools.cached_property
    def _number(self) -> int:
        """The number of this change, by which Dispatchers find the rows that it writes."""
        return next_numbers(self.connection, TENANTS.name) + 1

    def tenant(self, tenant: str) -> Row:
        """The row of a tenant that exists. Raises `NotFound`."""
        return _tenant_row(self.connection, tenant)

    def exists(self, tenant: str) -> bool:
        """Return whether there is such a tenant."""
        found = select(TENANTS.c.id).where(TENANTS.c.id == tenant, TENANTS.c.deleted.is_(None))
        return self.connection.execute(found).first() is not None

    def put_tenants(self, limits: Mapping[str, Mapping[str, Any]], managed_by: str) -> None:
        """Write the limits of tenants, whether or not they exist or have existed."""
        if not limits:
            return
        before = {
            row.id: row
            for row in self.connection.execute(
                select(TENANTS.c.id, TENANTS.c.created, TENANTS.c.deleted)
            )
            if row.id in limits
        }
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
        if len(self.connection.execute(_valid_keys(tenant).where(unexpired)).all()) >= MOST_KEYS:
            raise Conflict(f"tenant '{tenant}' has {MOST_KEYS} keys: revoke some first")
        secret = f"octet_{tenant}_{secrets.token_hex(KEY_BYTES)}"
        row = self.key_row(tenant, digest(secret), scopes, API, self._now, expires)
        self.add_keys([row])
        return NewKey(secret, _key(row))

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
        for row in self.connection.execute(_valid_keys(tenant)).mappings().all():
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


def _differences(
    connection: Connection,
    tenants: Mapping[str, Tenant],
    keys: KeyDigests | None,
    managed_by: ManagedBy,
) -> list[Difference]:
    """What differs between the files and what is in the database; see `Administration.apply`."""
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


def _valid_keys(tenant: str) -> Select[Any]:
    return select(KEYS).where(KEYS.c.tenant == tenant, KEYS.c.revoked.is_(None))


def _tenant_row(connection: Connection, tenant: str) -> Row:
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


def _scopes(given: Sequence[str]) -> tuple[Scope, ...]:
    """The scopes in their usual order. Raises `InvalidRequest` if there is none or a wrong one."""
    for name in given:
        if name not in SCOPES:
            hint = did_you_mean(str(name), SCOPES)
            raise InvalidRequest(f"unknown scope '{name}': {hint}", param="scopes")
    if not given:
        raise InvalidRequest(f"scopes is empty: name some of {', '.join(SCOPES)}", param="scopes")
    return tuple(scope for scope in SCOPES if scope in given)


def _tenant(row: Row) -> StoredTenant:
    return StoredTenant(row["id"], json.loads(row["limits"]), row["managed_by"], row["created"])


def _key(row: Row) -> StoredKey:
    values = {name: row[name] for name in StoredKey._fields}
    return StoredKey(**{**values, "scopes": _scopes(row["scopes"].split())})


def _about(key: StoredKey) -> dict[str, Any]:
    return {"scopes": list(key.scopes), "expires_at": key.expires}


def _entry(row: Row) -> AuditEntry:
    return AuditEntry(**{**row, "details": json.loads(row["details"])})
