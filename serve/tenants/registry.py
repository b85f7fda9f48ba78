"""The tenants and their valid keys, as a Dispatcher follows them in the database."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select

from ..store.database import Database
from ..store.schema import COUNTERS, KEYS, TENANTS
from ..store.times import unix_time
from .keys import SCOPES, ApiKey, TenantAccess, TenantChanges, access_of, all_access
from .limits import known_tenant
from .tenant import Tenant

log = logging.getLogger("ray.serve")

SOME = 500  # tenants that one statement names


class TenantRegistry:
    """The tenants by their ids, and the valid keys of each. Methods block: call them in a thread.

    Each change in the database has a number, so `read` reads only what has changed since.
    """

    def __init__(self, database: Database) -> None:
        """Read all tenants. Raises `StoreUnavailable`, an `OSError`, if they cannot be read."""
        self._database = database
        self._seen = -1
        self.tenants: dict[str, Tenant] = {}
        self.keys: dict[str, tuple[ApiKey, ...]] = {}
        self.read()

    @property
    def whole(self) -> TenantChanges:
        """The access of all tenants."""
        return TenantChanges(all_access(self.tenants, self.keys), whole=True)

    def read(self) -> TenantChanges | None:
        """Read what has changed since the last time; None if nothing has.

        Raises `StoreUnavailable`, an `OSError`, if the database cannot be read.
        """
        found = self._database.read(self._changed_rows)
        if found is None:
            return None
        seen, tenants, keys = found
        changed: dict[str, TenantAccess | None] = {}
        valid = defaultdict[str, list[ApiKey]](list)
        for row in keys:
            expires = None if row.expires is None else unix_time(row.expires)
            scopes = tuple(scope for scope in SCOPES if scope in row.scopes.split())
            valid[row.tenant].append(ApiKey(row.sha256, scopes, expires))
        for row in tenants:
            if row.deleted is not None:
                self.tenants.pop(row.id, None)
                self.keys.pop(row.id, None)
                changed[row.id] = None
                continue
            try:
                tenant = known_tenant(json.loads(row.limits))
            except ValueError:  # a newer release allows what this one does not
                log.exception("tenant %s keeps its last limits, if there are any", row.id)
                tenant = self.tenants.get(row.id, Tenant(max_requests=0))
            self.tenants[row.id] = tenant
            self.keys[row.id] = tuple(valid[row.id])
            changed[row.id] = access_of(tenant, self.keys[row.id])
        self._seen = seen
        return TenantChanges(changed)

    def _changed_rows(
        self, connection: Connection
    ) -> tuple[int, Sequence[Any], Sequence[Any]] | None:
        """The number of the last change, the changed tenants, and all valid keys of these."""
        counter = select(COUNTERS.c.value).where(COUNTERS.c.name == TENANTS.name)
        last: int = connection.execute(counter).scalar_one()
        if last == self._seen:
            return None
        valid = select(KEYS.c.tenant, KEYS.c.sha256, KEYS.c.scopes, KEYS.c.expires).where(
            KEYS.c.revoked.is_(None)
        )
        if self._seen < 0:
            tenants = connection.execute(select(TENANTS)).all()
            return last, tenants, connection.execute(valid.order_by(KEYS.c.created)).all()
        ids = set(
            connection.execute(select(TENANTS.c.id).where(TENANTS.c.changed > self._seen)).scalars()
        )
        by_keys = select(KEYS.c.tenant).where(KEYS.c.changed > self._seen)
        names = sorted({*ids, *connection.execute(by_keys).scalars()})
        tenants, keys = list[Any](), list[Any]()
        for begin in range(0, len(names), SOME):
            some = names[begin : begin + SOME]
            tenants += connection.execute(select(TENANTS).where(TENANTS.c.id.in_(some))).all()
            keys += connection.execute(valid.where(KEYS.c.tenant.in_(some))).all()
        return last, tenants, keys
