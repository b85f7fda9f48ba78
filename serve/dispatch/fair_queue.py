"""Start-time fair queueing between tenants, first come first served within each tenant.

Each pool is shared independently of the others. A tenant's *clock* in a pool is the work that the
pool has granted to the tenant ÷ the tenant's weight. A free slot of the pool goes to the waiting
tenant with the lowest clock. That clock then moves on by the image's work ÷ weight.

Two properties follow. No slot stays free while an item waits for it. And while two tenants wait for
the same pool, their granted work per weight differs by at most their largest image per weight.

The work of an image is predicted. When the image has ended, the clock is corrected by the
difference between its real and its predicted work. So over time tenants share the real time of
replicas, not the predicted time.

A tenant without waiting items may have fallen behind. When it comes back, its clock is raised to
the clock at which the pool last granted a slot. So it gets no credit for the time that it was away,
but it is served next.

An item may wait for several pools; it leaves all of them when it is granted in one. Adding, taking
and removing an item cost O(log tenants) for each of its pools. The algorithm is that of Goyal, Vin
& Cheng 1996, with one difference: this file keeps one clock for each tenant instead of a tag for
each item. That makes removals and corrections exact.

Pure: standard library only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, merge
from typing import Generic, Protocol, TypeVar

SLACK = 64  # a heap may hold so many keys more than twice the number of waiting tenants


class Queueable(Protocol):
    """The fields of an item that the queue reads; the queue itself sets `number`."""

    number: int  # order in which items were added

    @property
    def since(self) -> float:
        """The time of arrival, in seconds; a tenant's items are served in this order."""

    @property
    def tenant(self) -> str: ...

    @property
    def work_s(self) -> float:
        """The predicted work, in seconds of a reference replica."""

    @property
    def pools(self) -> tuple[str, ...]:
        """The pools that may serve the item, preferred first."""


T = TypeVar("T", bound=Queueable)


@dataclass(slots=True)
class _Flow(Generic[T]):
    """One tenant's clock and waiting items (`line`) in one pool.

    The first item of `line` is always the one that arrived first. The others are in order of
    arrival only if `in_order`: sorting waits until it is needed, because after a restart of the
    Dispatcher many items come late at once.
    """

    clock: float
    line: OrderedDict[int, T] = field(default_factory=OrderedDict)
    in_order: bool = True
    backlog_s: float = 0.0
    running: int = 0  # items taken and not yet settled
    key: tuple[float, int] | None = None  # the flow's key in the heap, while anything waits
    idle_clock: float | None = None  # the flow's clock in the heap of idle flows

    def enter(self, item: T) -> None:
        """Let an item wait; it may have arrived before some that wait already."""
        first = next(iter(self.line.values()), item)
        last = next(reversed(self.line.values()), item)
        self.line[item.number] = item
        if item.since < first.since:
            self.line.move_to_end(item.number, last=False)
        elif item.since < last.since:
            self.in_order = False

    def leave(self, item: T) -> None:
        """Take an item out of the line."""
        if next(iter(self.line)) == item.number:
            self.sort()
        del self.line[item.number]

    def sort(self) -> None:
        """Put the line into order of arrival."""
        if not self.in_order:
            by_arrival = sorted(self.line.items(), key=lambda entry: (entry[1].since, entry[0]))
            self.line, self.in_order = OrderedDict(by_arrival), True


class _PoolQueue(Generic[T]):
    """The tenants of one pool.

    A tenant is kept while it has waiting or running items there, or a clock above `granted_at`.
    """

    def __init__(self) -> None:
        self.flows: dict[str, _Flow[T]] = {}
        self.waiting: set[str] = set()
        self.granted_at = 0.0  # the clock at which the last slot was granted
        self._heap: list[tuple[float, int, str]] = []  # keys of waiting flows, current and stale
        self._idle: list[tuple[float, str]] = []  # idle flows, by clock

    def enter(self, item: T) -> None:
        flow = self.flows.setdefault(item.tenant, _Flow(self.granted_at))
        if not flow.line:
            flow.clock = max(flow.clock, self.granted_at)
            self.waiting.add(item.tenant)
        flow.enter(item)
        flow.backlog_s += item.work_s
        self._place(item.tenant, flow)

    def leave(self, item: T) -> None:
        flow = self.flows[item.tenant]
        flow.leave(item)
        flow.backlog_s -= item.work_s
        if not flow.line:
            flow.backlog_s = 0.0  # removes rounding errors
            self.waiting.discard(item.tenant)
        self._place(item.tenant, flow)
        self._forget_idle()

    def charge(self, tenant: str, served: float) -> None:
        """Count a slot granted to the tenant; `served`: the item's work ÷ the tenant's weight."""
        self.granted_at = max(self.granted_at, self.flows[tenant].clock)
        self.resume(tenant, served)

    def resume(self, tenant: str, served: float) -> None:
        """Count a slot that the tenant holds already; `served`: as for `charge`."""
        flow = self.flows.setdefault(tenant, _Flow(self.granted_at))
        flow.running += 1
        flow.clock += served
        self._place(tenant, flow)

    def settle(self, tenant: str, correction: float) -> None:
        """Count the end of a running item.

        `correction`: its real minus its predicted work, ÷ the tenant's weight.
        """
        flow = self.flows.get(tenant)
        if flow and flow.running:
            flow.running -= 1
            flow.clock += correction
            self._place(tenant, flow)
            self._forget_idle()

    def first(self) -> T | None:
        while self._heap:
            clock, number, tenant = self._heap[0]
            flow = self.flows.get(tenant)
            if flow and flow.key == (clock, number):
                return flow.line[number]
            heappop(self._heap)
        return None

    def first_of(self, may: Callable[[str], bool]) -> T | None:
        """The first item of those tenants for which `may` is true; takes O(tenants)."""
        keys = (
            (flow.key, flow) for name in self.waiting if may(name) and (flow := self.flows[name])
        )
        found = min(
            ((key, flow) for key, flow in keys if key), key=lambda pair: pair[0], default=None
        )
        return found[1].line[found[0][1]] if found else None

    def _place(self, tenant: str, flow: _Flow[T]) -> None:
        """Put a flow into the heap again if its key has changed, or among the idle flows.

        The key is the flow's clock and the number of its first waiting item. Stale keys stay in the
        heap until they come first, or until there are too many of them.
        """
        if not flow.line:
            flow.key = None
            if not flow.running and flow.idle_clock != flow.clock:
                flow.idle_clock = flow.clock
                heappush(self._idle, (flow.clock, tenant))
            return
        key = flow.clock, next(iter(flow.line))
        if key != flow.key:
            flow.key = key
            heappush(self._heap, (*key, tenant))
        if len(self._heap) > 2 * len(self.waiting) + SLACK:
            current = ((name, self.flows[name].key) for name in self.waiting)
            self._heap = [(*key, name) for name, key in current if key]
            heapify(self._heap)

    def _forget_idle(self) -> None:
        """Drop idle tenants whose clocks are not above `granted_at`.

        Nothing is lost: if such a tenant came back, its clock would be raised to `granted_at`.
        """
        while self._idle and self._idle[0][0] <= self.granted_at:
            clock, tenant = heappop(self._idle)
            flow = self.flows.get(tenant)
            if flow and flow.idle_clock == clock:
                flow.idle_clock = None
                if not flow.line and not flow.running and flow.clock <= self.granted_at:
                    del self.flows[tenant]


@dataclass(slots=True)
class _Backlog:
    """The number and the work of one tenant's waiting items, in all pools together."""

    items: int = 0
    work_s: float = 0.0


class FairQueue(Generic[T]):
    """A fair queue for several pools, as the module's docstring describes it.

    `weight`: returns a tenant's weight. Its share of a pool is this weight ÷ the weights of all
    that wait.
    """

    def __init__(self, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        self.weight = weight
        self._pools: dict[str, _PoolQueue[T]] = {}
        self._arrivals = 0
        self._waiting: dict[int, T] = {}
        self._backlogs: dict[str, _Backlog] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        """The waiting items, in the order in which they were added."""
        return iter(self._waiting.values())

    def add(self, item: T) -> None:
        """Let an item wait for all of its pools, and set its `number`.

        An item that arrived earlier than some of its tenant's waiting items gets its place before
        them.
        """
        self._arrivals += 1
        item.number = self._arrivals
        self._waiting[item.number] = item
        backlog = self._backlogs.setdefault(item.tenant, _Backlog())
        backlog.items += 1
        backlog.work_s += item.work_s
        for pool in item.pools:
            self._pools.setdefault(pool, _PoolQueue()).enter(item)

    def remove(self, item: T) -> None:
        """Take an item out of the queue without serving it."""
        del self._waiting[item.number]
        backlog = self._backlogs[item.tenant]
        backlog.items -= 1
        backlog.work_s -= item.work_s
        if not backlog.items:
            del self._backlogs[item.tenant]
        for pool in item.pools:
            self._pools[pool].leave(item)

    def first(self, pool: str, may: Callable[[str], bool] | None = None) -> T | None:
        """The item that gets the pool's next free slot; None if no item waits for the pool.

        `may`: whether a tenant may have that slot; None: all may.
        """
        if (queue := self._pools.get(pool)) is None:
            return None
        found = queue.first()
        return found if found is None or may is None or may(found.tenant) else queue.first_of(may)

    def take(self, item: T, pool: str) -> None:
        """Serve an item in one of its pools. The caller must call `settle` when it has ended."""
        self._pools[pool].charge(item.tenant, item.work_s / self.weight(item.tenant))
        self.remove(item)

    def taken_before(self, tenant: str, pool: str, work_s: float) -> None:
        """Count an item that runs already, without having been taken from this queue.

        `work_s`: its work, or 0 if the tenant's clock holds it already. As after `take`, the caller
        must call `settle` when the item has ended.
        """
        queue = self._pools.setdefault(pool, _PoolQueue())
        queue.resume(tenant, work_s / self.weight(tenant))

    def settle(self, tenant: str, pool: str, correction_s: float) -> None:
        """Count the end of a served item, which took `correction_s` more work than predicted.

        `correction_s` is negative if the item took less.
        """
        if queue := self._pools.get(pool):
            queue.settle(tenant, correction_s / self.weight(tenant))

    def order(self, pool: str) -> Iterator[T]:
        """The waiting items of a pool in the order in which they are served if no others come."""
        queue = self._pools.get(pool)
        if queue is None:
            return
        lines = (self._tagged(name, queue.flows[name]) for name in queue.waiting)
        for _, _, item in merge(*lines):
            yield item

    def backlogs(self, pools: tuple[str, ...]) -> dict[str, float]:
        """The work in seconds that each tenant has waiting for these pools.

        If a tenant waits for several of the pools, only its largest backlog counts. So an item that
        waits for several pools is not counted twice.
        """
        found: dict[str, float] = {}
        for queue in filter(None, map(self._pools.get, pools)):
            for name in queue.waiting:
                found[name] = max(found.get(name, 0.0), queue.flows[name].backlog_s)
        return found

    def waiting(self, tenant: str) -> tuple[int, float]:
        """The number of a tenant's waiting items, and their work in seconds."""
        backlog = self._backlogs.get(tenant, _Backlog())
        return backlog.items, backlog.work_s

    def largest_backlog(self, *, but: str) -> str | None:
        """The tenant with the most waiting work ÷ weight, apart from tenant `but`; None if none."""
        others = ((b.work_s / self.weight(t), t) for t, b in self._backlogs.items() if t != but)
        return max(others, default=(0.0, None))[1]

    def newest(self, tenant: str) -> T:
        """The item that a tenant with waiting items has added last."""
        return next(item for item in reversed(self._waiting.values()) if item.tenant == tenant)

    def _tagged(self, tenant: str, flow: _Flow[T]) -> Iterator[tuple[float, int, T]]:
        clock = flow.clock
        flow.sort()
        for item in flow.line.values():
            yield clock, item.number, item
            clock += item.work_s / self.weight(tenant)
