"""The policy's memory of a pool: ordered and ready replicas, their speed and their start time.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from .load import PolicyTuning, PoolBounds, Supply

LEARNING_RATE = 0.3  # how much the time of one start changes the expected time of the next
LATE_FACTOR = 3.0  # a start that takes this many times its expected time may never end
RETRY_S = 600.0  # seconds until a pool whose replicas did not become ready is tried again


class ReplicaOrder(NamedTuple):
    """Replicas that were ordered at the time `at` and are not ready yet."""

    at: float
    replicas: int


class ReplicasNeeded(NamedTuple):
    """The number of replicas needed at the time `at`; since then fewer have been needed."""

    at: float
    replicas: int


@dataclass(frozen=True, slots=True)
class PoolState:
    """The state of one pool.

    - `start_s`, `speed`: the start time and the speed of a replica, as learned.
    - `busy`: the last time at which the pool had anything to do.
    - `arriving`, `draining`: histories of the replicas that were needed for arriving work and for
      queued work; see `policy`.
    - `kept`: the replicas that stay ready for jumps of the rate.
    - `given_up_at`: the time at which the policy stopped waiting for the pool's replicas, None
      while it waits for them.
    """

    wanted: int
    ready: int
    start_s: float
    speed: float
    busy: float
    orders: tuple[ReplicaOrder, ...] = ()
    arriving: tuple[ReplicasNeeded, ...] = ()
    draining: tuple[ReplicasNeeded, ...] = ()
    given_up_at: float | None = None
    kept: int = 0

    @property
    def needed(self) -> int:
        """The replicas that arriving and queued work have needed of late."""
        history = (*self.arriving[:1], *self.draining[:1])
        return max((need.replicas for need in history), default=0)

    @property
    def needed_now(self) -> int:
        """The replicas that arriving and queued work need now."""
        history = (*self.arriving[-1:], *self.draining[-1:])
        return max((need.replicas for need in history), default=0)

    @property
    def starting(self) -> int:
        return max(self.wanted - self.ready, 0)

    @property
    def given_up(self) -> bool:
        """Return whether the policy no longer waits for the pool's replicas to become ready."""
        return self.given_up_at is not None


def updated(
    known: PoolState | None,
    pool: PoolBounds,
    supply: Supply | None,
    tuning: PolicyTuning,
    now: float,
) -> PoolState:
    """Update a pool's state with what its replicas report now.

    `known`: the state so far, None for a new pool. `supply`: the report, None if there is none.
    """
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
        took_s = min(max(now - oldest.at, start_s / LATE_FACTOR), start_s * LATE_FACTOR)
        learn = 1.0 if known.start_s == pool.start_s else 1 - (1 - LEARNING_RATE) ** taken
        start_s += learn * (took_s - start_s)
        # One replica of this order has become ready, so the others may: their time begins anew.
        left = ReplicaOrder(now, oldest.replicas - taken)
        orders, came = (left, *others) if left.replicas else tuple(others), came - taken
    orders = _ordered(orders, max(known.wanted - supply.ready, 0), now)
    late_s = now - orders[0].at if orders else 0.0
    patience_s = tuning.node_wait_s + (LATE_FACTOR * start_s if supply.placeable else 0.0)
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
    """Change the orders so that `starting` replicas are ordered in all.

    Missing replicas are ordered now. If there are too many, the newest orders are called off.
    """
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
    """The nearest number of replicas within the pool's bounds."""
    return min(max(replicas, pool.min_replicas), pool.max_replicas)
