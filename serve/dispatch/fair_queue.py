"""Start-time fair queueing between tenants, first come first served within each.

Every pool is shared by itself. A tenant's *clock* in a pool is the work that it was granted there ÷
its weight; a slot of the pool goes to the waiting tenant whose clock is lowest, and that clock then
moves on by the work of the item ÷ weight. So while two tenants wait for a pool, what they were
granted there per weight never drifts further apart than their largest item is per weight, and no
slot stays free while somebody waits for it. What an item took in truth corrects the clock later,
so over time it is what was taken that is shared.

A tenant that comes back is lifted to the clock at which the pool last granted: it has no credit for
having been away, and goes next.

An item may wait for several pools and is taken from all of them at once. Adding, taking and
removing one cost O(log tenants) for each of its pools. Goyal, Vin & Cheng 1996 describe the
algorithm; counting per tenant instead of tagging each item makes removals and corrections exact.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, merge
from typing import Any

SLACK = 64  # stale keys that a heap may hold beside twice the tenants that wait


@dataclass(slots=True)
class Item:
    """Something that waits; `work_s` is what it will take, in seconds of a reference replica."""

    tenant: str
    work_s: float
    pools: tuple[str, ...]  # preferred first
    what: Any = None
    number: int = 0  # order of arrival


@dataclass(slots=True)
class _Flow:
    """A tenant in a pool."""

    clock: float
    line: OrderedDict[int, Item] = field(default_factory=OrderedDict)
    backlog_s: float = 0.0
    running: int = 0  # taken, and not yet settled
    key: tuple[float, int] | None = None  # as it stands in the heap, while it waits
    ahead: float | None = None  # the clock with which it stands among the idle


class _Pool:
    """The tenants that wait for one pool, that run in it, or whose clocks are still ahead."""

    def __init__(self) -> None:
        self.flows: dict[str, _Flow] = {}
        self.waiting: set[str] = set()
        self.granted_at = 0.0  # the clock at which the last slot was granted
        self._heap: list[tuple[float, int, str]] = []  # keys of flows, current and stale
        self._ahead: list[tuple[float, str]] = []  # idle flows, by clock

    def enter(self, item: Item) -> None:
        flow = self.flows.setdefault(item.tenant, _Flow(self.granted_at))
        if not flow.line:
            flow.clock = max(flow.clock, self.granted_at)
            self.waiting.add(item.tenant)
        flow.line[item.number] = item
        flow.backlog_s += item.work_s
        self._place(item.tenant, flow)

    def leave(self, item: Item) -> None:
        flow = self.flows[item.tenant]
        del flow.line[item.number]
        flow.backlog_s -= item.work_s
        if not flow.line:
            flow.backlog_s = 0.0  # without the dust of rounding
            self.waiting.discard(item.tenant)
        self._place(item.tenant, flow)
        self._forget()

    def charge(self, tenant: str, served: float) -> None:
        """A slot is granted; `served`: work ÷ weight."""
        flow = self.flows[tenant]
        self.granted_at = max(self.granted_at, flow.clock)
        flow.running += 1
        flow.clock += served
        self._place(tenant, flow)

    def settle(self, tenant: str, correction: float) -> None:
        """What runs has ended; `correction`: work ÷ weight."""
        flow = self.flows.get(tenant)
        if flow and flow.running:
            flow.running -= 1
            flow.clock += correction
            self._place(tenant, flow)
            self._forget()

    def first(self) -> Item | None:
        while self._heap:
            clock, number, tenant = self._heap[0]
            flow = self.flows.get(tenant)
            if flow and flow.key == (clock, number):
                return flow.line[number]
            heappop(self._heap)
        return None

    def _place(self, tenant: str, flow: _Flow) -> None:
        """Keep the heap's key of a flow true: its clock, and the arrival of its first item."""
        if not flow.line:
            flow.key = None
            if not flow.running and flow.ahead != flow.clock:
                flow.ahead = flow.clock
                heappush(self._ahead, (flow.clock, tenant))
            return
        key = flow.clock, next(iter(flow.line))
        if key != flow.key:
            flow.key = key
            heappush(self._heap, (*key, tenant))
        if len(self._heap) > 2 * len(self.waiting) + SLACK:
            current = ((name, self.flows[name].key) for name in self.waiting)
            self._heap = [(*key, name) for name, key in current if key]
            heapify(self._heap)

    def _forget(self) -> None:
        """Idle tenants whose clocks the pool has passed would be lifted anyway."""
        while self._ahead and self._ahead[0][0] <= self.granted_at:
            clock, tenant = heappop(self._ahead)
            flow = self.flows.get(tenant)
            if flow and flow.ahead == clock:
                flow.ahead = None
                if not flow.line and not flow.running and flow.clock <= self.granted_at:
                    del self.flows[tenant]


@dataclass(slots=True)
class _Backlog:
    """What a tenant has waiting, in all pools together."""

    items: int = 0
    work_s: float = 0.0


class FairQueue:
    """See the module's text. A tenant that `weights` does not have has weight 1."""

    def __init__(self) -> None:
        self.weights: Mapping[str, float] = {}
        self._pools: dict[str, _Pool] = {}
        self._arrivals = 0
        self._waiting: dict[int, Item] = {}
        self._backlogs: dict[str, _Backlog] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Item]:
        """By arrival."""
        return iter(self._waiting.values())

    def add(self, item: Item) -> None:
        self._arrivals += 1
        item.number = self._arrivals
        self._waiting[item.number] = item
        backlog = self._backlogs.setdefault(item.tenant, _Backlog())
        backlog.items += 1
        backlog.work_s += item.work_s
        for pool in item.pools:
            self._pools.setdefault(pool, _Pool()).enter(item)

    def remove(self, item: Item) -> None:
        """It will not be served."""
        del self._waiting[item.number]
        backlog = self._backlogs[item.tenant]
        backlog.items -= 1
        backlog.work_s -= item.work_s
        if not backlog.items:
            del self._backlogs[item.tenant]
        for pool in item.pools:
            self._pools[pool].leave(item)

    def first(self, pool: str) -> Item | None:
        """Who is next in a pool."""
        queue = self._pools.get(pool)
        return queue.first() if queue else None

    def take(self, item: Item, pool: str) -> None:
        """Serve an item in one of its pools; `settle` has to follow."""
        self._pools[pool].charge(item.tenant, item.work_s / self.weight(item.tenant))
        self.remove(item)

    def taken_before(self, tenant: str, pool: str, work_s: float) -> None:
        """As `take`, for what a queue before this one has granted."""
        queue = self._pools.setdefault(pool, _Pool())
        flow = queue.flows.setdefault(tenant, _Flow(queue.granted_at))
        flow.running += 1
        flow.clock += work_s / self.weight(tenant)

    def settle(self, tenant: str, pool: str, correction_s: float) -> None:
        """What was taken has ended; it took so much more work than it was charged."""
        if queue := self._pools.get(pool):
            queue.settle(tenant, correction_s / self.weight(tenant))

    def order(self, pool: str) -> Iterator[Item]:
        """Who would be served in which order, if nobody else came."""
        queue = self._pools.get(pool)
        if queue is None:
            return
        lines = (self._tagged(name, queue.flows[name]) for name in queue.waiting)
        for _, _, item in merge(*lines):
            yield item

    def weight(self, tenant: str) -> float:
        return self.weights.get(tenant, 1.0)

    def backlogs(self, pools: tuple[str, ...]) -> dict[str, float]:
        """The work that each tenant has waiting for some of these pools.

        Of the pool for which it has most: what waits for several is not counted twice.
        """
        found: dict[str, float] = {}
        for queue in filter(None, map(self._pools.get, pools)):
            for name in queue.waiting:
                found[name] = max(found.get(name, 0.0), queue.flows[name].backlog_s)
        return found

    def waiting(self, tenant: str) -> tuple[int, float]:
        """Items of a tenant, and their work."""
        backlog = self._backlogs.get(tenant, _Backlog())
        return backlog.items, backlog.work_s

    def _tagged(self, tenant: str, flow: _Flow) -> Iterator[tuple[float, int, Item]]:
        clock = flow.clock
        for item in flow.line.values():
            yield clock, item.number, item
            clock += item.work_s / self.weight(tenant)
