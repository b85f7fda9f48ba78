"""Leases of budget: what each of several clusters may still spend of a tenant's monthly work.

All clusters that use one database may serve the same tenant. Before a cluster admits a call of a
tenant with a budget, it leases the call's work from the budget. What was charged this month and
what all clusters have leased is never more than the budget, so the budget holds exactly. When an
image is charged, its work moves from the lease to the sums, in one transaction.

A cluster that has not been heard of for `DEAD_S` has no leases any more. Times are those of the
database, so clusters need not agree on the time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, case, delete, insert, select, update

from ..store.database import Database
from ..store.schema import CLUSTERS, LEASES, SUMS
from .record import Used

DEAD_S = 30.0
# With plenty left, a lease is for several calls, so that not every call costs a transaction.
DUST = 1e-6  # seconds of work by which sums of the same numbers may differ
PLENTY, AHEAD = 200.0, 8.0  # budget left ÷ work needed; work leased in advance ÷ work needed


class NeededWork(NamedTuple):
    """The work of a call that waits; `kept_s`: work that it must leave to accepted jobs."""

    work_s: float
    kept_s: float = 0.0


class Need(NamedTuple):
    """The work that a tenant needs beyond its lease, and its whole monthly work.

    `owed_s`: work of open calls that its lease does not hold. `works`: of each call that waits.
    """

    owed_s: float
    works: tuple[NeededWork, ...]
    monthly_work: float


class Heard(NamedTuple):
    """The use that other clusters have told, by their ids, and the leases here, by tenant."""

    others: dict[str, dict[str, Used]]
    leased: dict[str, float]


class ReplacedError(OSError):
    """Another Dispatcher of the same cluster has taken over."""


class ForgottenError(OSError):
    """This cluster was not heard of for so long that its leases have ended: it must join again."""


class BudgetLeases:
    """The leases of one cluster. Methods block: call them in a thread, one at a time.

    Each method raises `StoreUnavailable`, an `OSError`, if the database cannot be used. All but
    `join` raise `ReplacedError` if another Dispatcher of this cluster has taken over, and
    `ForgottenError` if its leases have ended.
    """

    def __init__(self, database: Database, cluster: str, incarnation: str) -> None:
        """`cluster`: an id that no other cluster has. `incarnation`: an id of this Dispatcher."""
        self._database, self._cluster, self._incarnation = database, cluster, incarnation

    def join(self, month: str) -> dict[str, float]:
        """Take over from an earlier Dispatcher of this cluster; return its leases by tenant."""

        def work(connection: Connection) -> dict[str, float]:
            connection.execute(delete(CLUSTERS).where(CLUSTERS.c.id == self._cluster))
            row = {"id": self._cluster, "incarnation": self._incarnation, "counts": "{}"}
            now = self._database.now(connection)
            connection.execute(insert(CLUSTERS).values(**row, seen=now))
            connection.execute(delete(LEASES).where(LEASES.c.month < month))
            return self._leased(connection, month)

        return self._database.write(work)

    def extend(self, needs: Mapping[str, Need], month: str) -> dict[str, float]:
        """Lease what tenants need, as far as so much is left; return what was leased in addition.

        If not everything is left, a call that came earlier gets its work first.
        """

        def work(connection: Connection) -> dict[str, float]:
            alive = self._alive(connection)
            names = sorted(needs)
            sums = select(SUMS.c.tenant, SUMS.c.work_s)
            sums = sums.where(SUMS.c.month == month, SUMS.c.tenant.in_(names))
            spent = {row.tenant: row.work_s for row in connection.execute(sums)}
            columns = LEASES.c.tenant, LEASES.c.cluster, LEASES.c.work_s
            leases = select(*columns).where(LEASES.c.month == month, LEASES.c.tenant.in_(names))
            mine: dict[str, float] = {}
            others: dict[str, float] = {}
            for tenant, cluster, work_s in connection.execute(leases):
                if cluster == self._cluster:
                    mine[tenant] = work_s
                elif cluster in alive:
                    others[tenant] = others.get(tenant, 0.0) + work_s
            granted = {}
            for tenant, need in needs.items():
                elsewhere = spent.get(tenant, 0.0) + others.get(tenant, 0.0)
                left = need.monthly_work - elsewhere - mine.get(tenant, 0.0)
                granted[tenant] = leased_of(left, need)
            self._add(connection, granted, mine.keys(), month)
            return granted

        return self._database.write(work)

    def beat(self, used: Mapping[str, Used], returned: Mapping[str, float], month: str) -> Heard:
        """Tell that this cluster lives, and what its tenants use; return the same of others.

        `returned`: work that is given back, because no open call needs it.
        """

        def work(connection: Connection) -> Heard:
            alive = self._alive(connection)
            values = {"seen": self._database.now(connection), "counts": json.dumps(used)}
            mine = CLUSTERS.c.id == self._cluster
            connection.execute(update(CLUSTERS).where(mine).values(values))
            less = {tenant: -work_s for tenant, work_s in returned.items()}
            self._add(connection, less, less.keys(), month)
            others = {name: text for name, text in alive.items() if name != self._cluster}
            told = {
                name: {tenant: Used(*found) for tenant, found in json.loads(text).items()}
                for name, text in others.items()
            }
            return Heard(told, self._leased(connection, month))

        return self._database.write(work)

    def _leased(self, connection: Connection, month: str) -> dict[str, float]:
        """The leases of this cluster by tenant."""
        mine = LEASES.c.cluster == self._cluster, LEASES.c.month == month
        found = select(LEASES.c.tenant, LEASES.c.work_s).where(*mine)
        return {row.tenant: row.work_s for row in connection.execute(found)}

    def _alive(self, connection: Connection) -> dict[str, str]:
        """The living clusters' counts, as JSON; forgets the dead ones."""
        now = self._database.now(connection)
        alive = {}
        for row in connection.execute(select(CLUSTERS)).all():
            if row.id == self._cluster and row.incarnation != self._incarnation:
                raise ReplacedError("another Dispatcher of this cluster has taken over")
            if row.id != self._cluster and row.seen < now - DEAD_S:
                connection.execute(delete(CLUSTERS).where(CLUSTERS.c.id == row.id))
                connection.execute(delete(LEASES).where(LEASES.c.cluster == row.id))
                continue
            alive[row.id] = row.counts
        if self._cluster not in alive:  # this process was away for so long that it counted as dead
            raise ForgottenError("this cluster was not heard of for too long")
        return alive

    def _add(
        self, connection: Connection, more: Mapping[str, float], known: Iterable[str], month: str
    ) -> None:
        """Change leases by so much work. `known`: the tenants that have one."""
        there = set(known)
        if old := {tenant: work_s for tenant, work_s in more.items() if tenant in there}:
            _change(connection, self._cluster, month, old)
        fresh = [
            {"cluster": self._cluster, "month": month, "tenant": tenant, "work_s": work_s}
            for tenant, work_s in more.items()
            if tenant not in there and work_s
        ]
        if fresh:
            connection.execute(insert(LEASES), fresh)


def leased_of(left: float, need: Need) -> float:
    """The work to lease for a need, if `left` is left: more than needed while there is plenty."""
    total = need.owed_s + sum(work.work_s for work in need.works)
    kept_s = max((work.kept_s for work in need.works), default=0.0)
    if left - kept_s >= total * PLENTY:
        return total * (1 + AHEAD)
    granted = need.owed_s if need.owed_s <= left else 0.0
    for work_s, kept_s in need.works:
        if granted + work_s <= left - kept_s + DUST:
            granted += work_s
    return granted


def charge_lease(
    connection: Connection, cluster: str, month: str, charged: Mapping[str, float]
) -> None:
    """Take charged work from a cluster's leases; call it in the charges' own transaction.

    `charged`: by tenant. A reversal gives nothing back to a lease.
    """
    if less := {tenant: -work_s for tenant, work_s in charged.items() if work_s > 0}:
        _change(connection, cluster, month, less)


def _change(connection: Connection, cluster: str, month: str, more: Mapping[str, float]) -> None:
    """Change a cluster's leases by so much work; none falls below 0."""
    after = LEASES.c.work_s + bindparam("more")
    connection.execute(
        update(LEASES)
        .where(
            LEASES.c.cluster == cluster,
            LEASES.c.month == month,
            LEASES.c.tenant == bindparam("name"),
        )
        .values(work_s=case((after > 0, after), else_=0.0)),
        [{"name": tenant, "more": work_s} for tenant, work_s in more.items()],
    )
