"""Start-time fair queueing between tenants; within each tenant, late items wait for the others.

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

Within a tenant, first come is first served, with two exceptions. An item that can no longer be done
in time is *late*: it waits behind those of its tenant that still can, so that a queue which was too
long for a while does not make everything late that comes after it. Late items do not starve: while
a tenant has any, every `LATE_TURN`-th of its slots goes to the first of them. And items that may
wait for long (`last`) stand behind all others of their tenant. None of this changes which tenant is
next.

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
LATE_TURN = 10  # while a tenant has late items, they get one of so many of its slots


class Queueable(Protocol):
    """The fields of an item that the queue reads; the queue itself sets `number` and `late`."""

    number: int  # order in which items were added
    late: bool  # whether it has been found late

    @property
    def since(self) -> float:
        """The time of arrival, in seconds; a tenant's items are served in this order."""

    @property
    def late_at(self) -> float:
        """The time after which the item can no longer be done in time."""

    @property
    def last(self) -> bool:
        """Return whether the item waits behind all others of its tenant."""

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
class _Line(Generic[T]):
    """Waiting items in order of arrival.

    The first of `items` is always the one that arrived first. The others are in order only if
    `in_order`: sorting waits until it is needed, because after a restart of the Dispatcher many
    items come late at once.
    """

    items: OrderedDict[int, T] = field(default_factory=OrderedDict)
    in_order: bool = True

    def enter(self, item: T) -> None:
        """Let an item wait; it may have arrived before some that wait already."""
        first = next(iter(self.items.values()), item)
        last = next(reversed(self.items.values()), item)
        self.items[item.number] = item
        if item.since < first.since:
            self.items.move_to_end(item.number, last=False)
        elif item.since < last.since:
            self.in_order = False

    def leave(self, item: T) -> None:
        """Take an item out of the line."""
        if next(iter(self.items)) == item.number:
            self.sort()
        del self.items[item.number]

    def sort(self) -> None:
        """Put the line into order of arrival."""
        if not self.in_order:
            by_arrival = sorted(self.items.items(), key=lambda entry: (entry[1].since, entry[0]))
            self.items, self.in_order = OrderedDict(by_arrival), True

    def first(self) -> T | None:
        return next(iter(self.items.values()), None)


@dataclass(slots=True)
class _Flow(Generic[T]):
    """One tenant's clock and waiting items in one pool."""

    clock: float
    timely: _Line[T] = field(default_factory=_Line)
    late: _Line[T] = field(default_factory=_Line)
    last: _Line[T] = field(default_factory=_Line)
    backlog_s: float = 0.0
    running: int = 0  # items taken and not yet settled
    turns: int = 0  # slots in a row that no late item got, while one waited
    key: tuple[float, int] | None = None  # the flow's key in the heap, while anything waits
    idle_clock: float | None = None  # the flow's clock in the heap of idle flows

    def line(self, item: T) -> _Line[T]:
        """The line in which an item waits."""
        if item.last:
            return self.last
        return self.late if item.late else self.timely

    def first(self) -> T | None:
        """The item that gets the flow's next slot."""
        late = self.late.first()
        if late and self.turns >= LATE_TURN - 1:
            return late
        return self.timely.first() or late or self.last.first()

    def in_order(self) -> Iterator[T]:
        """All waiting items, without regard to turns of late ones."""
        for line in (self.timely, self.late, self.last):
            line.sort()
            yield from line.items.values()

    def count_turn(self, item: T) -> None:
        """Note that an item gets a slot."""
        self.turns = self.turns + 1 if self.late.items and not item.late else 0


class _PoolQueue(Generic[T]):
    """The tenants of one pool.

    A tenant is kept while it has waiting or running items there, or a clock above `granted_at`.
    """

    def __init__(self, deferrable: Callable[[str], bool]) -> None:
        self._deferrable = deferrable
        self.flows: dict[str, _Flow[T]] = {}
        self.waiting: set[str] = set()
        self.granted_at = 0.0  # the clock at which the last slot was granted
        # Keys of waiting flows, current and stale; those of deferrable tenants are apart.
        self._heaps: tuple[list[tuple[float, int, str]], list[tuple[float, int, str]]] = [], []
        self._idle: list[tuple[float, str]] = []  # idle flows, by clock

    def enter(self, item: T) -> None:
        flow = self.flows.setdefault(item.tenant, _Flow(self.granted_at))
        if flow.key is None:
            flow.clock = max(flow.clock, self.granted_at)
            self.waiting.add(item.tenant)
        flow.line(item).enter(item)
        flow.backlog_s += item.work_s
        self._place(item.tenant, flow)

    def leave(self, item: T) -> None:
        flow = self.flows[item.tenant]
        flow.line(item).leave(item)
        flow.backlog_s -= item.work_s
        if flow.first() is None:
            flow.backlog_s = 0.0  # removes rounding errors
            self.waiting.discard(item.tenant)
        self._place(item.tenant, flow)
        self._forget_idle()

    def postpone(self, item: T) -> None:
        """Move an item to its tenant's late ones; the tenant's clock stays."""
        flow = self.flows[item.tenant]
        flow.timely.leave(item)
        flow.late.enter(item)
        self._place(item.tenant, flow)

    def charge(self, item: T, served: float) -> None:
        """Count a slot granted to an item; `served`: its work ÷ the tenant's weight."""
        flow = self.flows[item.tenant]
        self.granted_at = max(self.granted_at, flow.clock)
        flow.count_turn(item)
        self.resume(item.tenant, served)

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

    def first(self, *, deferrable: bool) -> T | None:
        """The item that is next, of tenants that are not deferrable or of all."""
        found = [flow for heap in self._heaps[: 1 + deferrable] if (flow := self._top(heap))]
        first = min(found, key=lambda flow: flow.key or (0.0, 0), default=None)
        return first.first() if first else None

    def _top(self, heap: list[tuple[float, int, str]]) -> _Flow[T] | None:
        while heap:
            clock, number, tenant = heap[0]
            flow = self.flows.get(tenant)
            if flow and flow.key == (clock, number):
                return flow
            heappop(heap)
        return None

    def _place(self, tenant: str, flow: _Flow[T]) -> None:
        """Put a flow into the heap again if its key has changed, or among the idle flows.

        The key is the flow's clock and the number of its next item. Stale keys stay in the heap
        until they come first, or until there are too many of them.
        """
        first = flow.first()
        if first is None:
            flow.key = None
            if not flow.running and flow.idle_clock != flow.clock:
                flow.idle_clock = flow.clock
                heappush(self._idle, (flow.clock, tenant))
            return
        key = flow.clock, first.number
        if key == flow.key:
            return
        flow.key = key
        heap = self._heaps[self._deferrable(tenant)]
        heappush(heap, (*key, tenant))
        if len(heap) > 2 * len(self.waiting) + SLACK:
            names = {name for _, _, name in heap} & self.waiting
            keys = ((self.flows[name].key, name) for name in names)
            heap[:] = [(*key, name) for key, name in keys if key]
            heapify(heap)

    def _forget_idle(self) -> None:
        """Drop idle tenants whose clocks are not above `granted_at`.

        Nothing is lost: if such a tenant came back, its clock would be raised to `granted_at`.
        """
        while self._idle and self._idle[0][0] <= self.granted_at:
            clock, tenant = heappop(self._idle)
            flow = self.flows.get(tenant)
            if flow and flow.idle_clock == clock:
                flow.idle_clock = None
                if flow.key is None and not flow.running and flow.clock <= self.granted_at:
                    del self.flows[tenant]


@dataclass(slots=True)
class _Backlog(Generic[T]):
    """One tenant's waiting items in the order in which they were added, and their work."""

    items: dict[int, T] = field(default_factory=dict)
    work_s: float = 0.0


def _never(_: str) -> bool:
    return False


class FairQueue(Generic[T]):
    """A fair queue for several pools, as the module's docstring describes it.

    `weight`: returns a tenant's weight. Its share of a pool is this weight ÷ the weights of all
    that wait. `deferrable`: whether `first` may leave a tenant out.
    """

    def __init__(
        self,
        weight: Callable[[str], float] = lambda _: 1.0,
        deferrable: Callable[[str], bool] = _never,
    ) -> None:
        self.weight, self._deferrable = weight, deferrable
        self._pools: dict[str, _PoolQueue[T]] = {}
        self._arrivals = 0
        self._waiting: dict[int, T] = {}
        self._backlogs: dict[str, _Backlog[T]] = {}

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
        backlog.items[item.number] = item
        backlog.work_s += item.work_s
        for pool in item.pools:
            self._pool(pool).enter(item)

    def remove(self, item: T) -> None:
        """Take an item out of the queue without serving it."""
        del self._waiting[item.number]
        backlog = self._backlogs[item.tenant]
        del backlog.items[item.number]
        backlog.work_s -= item.work_s
        if not backlog.items:
            del self._backlogs[item.tenant]
        for pool in item.pools:
            self._pools[pool].leave(item)

    def first(self, pool: str, now: float, *, deferrable: bool = True) -> T | None:
        """The item that gets the pool's next free slot; None if no item waits for the pool.

        `deferrable`: whether an item of a deferrable tenant may have that slot.
        """
        if (queue := self._pools.get(pool)) is None:
            return None
        while (found := queue.first(deferrable=deferrable)) and now > found.late_at:
            if found.late or found.last:
                break
            self._postpone(found)
        return found

    def waits_for(self, pool: str) -> bool:
        """Return whether any item waits for a pool."""
        return pool in self._pools and bool(self._pools[pool].waiting)

    def take(self, item: T, pool: str) -> None:
        """Serve an item in one of its pools. The caller must call `settle` when it has ended."""
        self._pools[pool].charge(item, item.work_s / self.weight(item.tenant))
        self.remove(item)

    def taken_before(self, tenant: str, pool: str, work_s: float) -> None:
        """Count an item that runs already, without having been taken from this queue.

        `work_s`: its work, or 0 if the tenant's clock holds it already. As after `take`, the caller
        must call `settle` when the item has ended.
        """
        queue = self._pool(pool)
        queue.resume(tenant, work_s / self.weight(tenant))

    def settle(self, tenant: str, pool: str, correction_s: float) -> None:
        """Count the end of a served item, which took `correction_s` more work than predicted.

        `correction_s` is negative if the item took less.
        """
        if queue := self._pools.get(pool):
            queue.settle(tenant, correction_s / self.weight(tenant))

    def order(self, pool: str) -> Iterator[T]:
        """The waiting items of a pool in the order in which they are served if no others come.

        Items that become late meanwhile, and the turns of late items, are not foreseen.
        """
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
        backlog = self._backlogs.get(tenant)
        return (len(backlog.items), backlog.work_s) if backlog else (0, 0.0)

    def backlog_s(self, tenant: str, pools: tuple[str, ...]) -> float:
        """The work that a tenant has waiting for these pools, as `backlogs` counts it."""
        flows = (self._pools[pool].flows.get(tenant) for pool in pools if pool in self._pools)
        return max((flow.backlog_s for flow in flows if flow), default=0.0)

    def largest_backlog(self, *, but: str) -> str | None:
        """The tenant with the most waiting work ÷ weight, apart from tenant `but`; None if none."""
        others = ((b.work_s / self.weight(t), t) for t, b in self._backlogs.items() if t != but)
        return max(others, default=(0.0, None))[1]

    def newest(self, tenant: str) -> T:
        """The item that a tenant with waiting items has added last."""
        return next(reversed(self._backlogs[tenant].items.values()))

    def _pool(self, name: str) -> _PoolQueue[T]:
        if (pool := self._pools.get(name)) is None:
            pool = self._pools[name] = _PoolQueue(self._deferrable)
        return pool

    def _postpone(self, item: T) -> None:
        """Let a late item wait behind those of its tenant that can still be in time."""
        for pool in item.pools:
            self._pools[pool].postpone(item)
        item.late = True

    def _tagged(self, tenant: str, flow: _Flow[T]) -> Iterator[tuple[float, int, T]]:
        clock = flow.clock
        for item in flow.in_order():
            yield clock, item.number, item
            clock += item.work_s / self.weight(tenant)
