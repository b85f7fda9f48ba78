"""What the policy remembers of a pool: replicas that have come, and those that have not.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from .load import PolicyTuning, PoolBounds, Supply

LEARN = 0.3  # how far one start moves the time that is expected of the next
LATE = 3.0  # a start that takes so many times as long as expected may never end
RETRY_S = 600.0  # until replicas that did not come are waited for again


class ReplicaOrder(NamedTuple):
    """Replicas that were wanted at a time and are not ready yet."""

    at: float
    replicas: int


class ReplicasNeeded(NamedTuple):
    """So many were needed at a time, and fewer ever since."""

    at: float
    replicas: int


@dataclass(frozen=True, slots=True)
class PoolState:
    """`start_s`, `speed`: of a replica, as learnt. `busy`: when there was last anything to do."""

    wanted: int
    ready: int
    start_s: float
    speed: float
    busy: float
    orders: tuple[ReplicaOrder, ...] = ()
    arriving: tuple[ReplicasNeeded, ...] = ()  # for what arrives
    draining: tuple[ReplicasNeeded, ...] = ()  # for what waits
    given_up_at: float | None = None  # its replicas do not come

    @property
    def starting(self) -> int:
        return max(self.wanted - self.ready, 0)

    @property
    def given_up(self) -> bool:
        return self.given_up_at is not None


def updated(
    known: PoolState | None,
    pool: PoolBounds,
    supply: Supply | None,
    tuning: PolicyTuning,
    now: float,
) -> PoolState:
    """As known before, and as its replicas report now; None: nothing is known, or reported."""
    if known is None:
        ready = supply.ready if supply else 0
        wanted = bounded(ready, pool)
        start_s = (supply and supply.start_s) or pool.start_s
        busy = now if ready else -math.inf
        known = PoolState(
            wanted, ready, start_s, pool.speed, busy, arriving=(ReplicasNeeded(now, wanted),)
        )
    if supply is None:
        return known
    came, orders, start_s = supply.ready - known.ready, known.orders, known.start_s
    while came > 0 and orders:
        oldest, *others = orders
        taken = min(came, oldest.replicas)
        took_s = min(max(now - oldest.at, start_s / LATE), start_s * LATE)
        learn = 1.0 if known.start_s == pool.start_s else 1 - (1 - LEARN) ** taken
        start_s += learn * (took_s - start_s)
        left = ReplicaOrder(now, oldest.replicas - taken)  # where one came others may
        orders, came = (left, *others) if left.replicas else tuple(others), came - taken
    orders = _ordered(orders, max(known.wanted - supply.ready, 0), now)
    late_s = now - orders[0].at if orders else 0.0
    patience_s = tuning.node_wait_s + (LATE * start_s if supply.placeable else 0.0)
    given_up_at = known.given_up_at
    if late_s > patience_s or not (supply.placeable or tuning.node_wait_s):
        given_up_at = now
    elif supply.ready > known.ready or now - (given_up_at or now) > RETRY_S:
        given_up_at = None
    return replace(
        known,
        ready=supply.ready,
        start_s=start_s,
        speed=supply.speed or known.speed,
        orders=orders,
        given_up_at=given_up_at,
    )


def _ordered(
    orders: tuple[ReplicaOrder, ...], starting: int, now: float
) -> tuple[ReplicaOrder, ...]:
    """So many in all: more are ordered now; fewer, and the newest are called off."""
    missing = starting - sum(order.replicas for order in orders)
    if missing > 0:
        return (*orders, ReplicaOrder(now, missing))
    kept = list(orders)
    while missing < 0:
        last = kept.pop()
        missing += last.replicas
        if missing > 0:
            kept.append(last._replace(replicas=missing))
    return tuple(kept)


def bounded(replicas: int, pool: PoolBounds) -> int:
    return min(max(replicas, pool.min_replicas), pool.max_replicas)
