"""A fleet under a workload and a policy, event by event: what it costs, and how long requests wait.

Requests go through the fair queue that serves real ones, their work is what `serve.cost` says, and
the policy is told once a second what the Dispatcher would tell it. Replicas and nodes are those of
`autoscaling.fleet`. The same seed gives the same result.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster.cost import CostCoefficients, ImageShape
from serve.dispatch.fair_queue import FairQueue, Item

from ..load import Demand, Load, PoolBounds, Supply
from .fleet import NodeType, PoolFleet, SimulatedReplica
from .workloads import Arrival, RequestShape, Workload

TICK_S = 1.0
PATIENCE_S = 3600.0  # how long after the last arrival requests may still be finished
IN_TIME_SLOWDOWN = 5.0  # of an answer in time, as a multiple of what the image takes alone
TEXT_TOKENS = 333
POINTS = 2000  # of a timeline


@dataclass(frozen=True, slots=True)
class SimulatedPool:
    """A pool with its nodes; `costs`: of an image on one of its replicas."""

    pool: PoolBounds
    machine: NodeType
    costs: CostCoefficients


class PolicyView(NamedTuple):
    """What a policy may know; requests: `running` in each pool, and `waiting` for all of them."""

    load: Load
    running: Mapping[str, int]
    waiting: int


Policy = Callable[[PolicyView, float], Mapping[str, int]]  # replicas of each pool, at a time


class TimelinePoint(NamedTuple):
    at: float
    arriving: float  # work a second
    queued: int
    wanted: int
    ready: int


@dataclass(slots=True)
class SimulationResult:
    """`waits`: seconds until the grant that led to the image; `changes`: of what was wanted."""

    requests: int = 0
    in_time: int = 0
    retried: int = 0
    waits: Sequence[float] = ()
    usd: float = 0.0
    replica_h: float = 0.0
    usd_by_card: dict[str, float] = field(default_factory=dict)
    ups: int = 0
    downs: int = 0
    starts: int = 0
    timeline: list[TimelinePoint] = field(default_factory=list)

    @property
    def violations(self) -> int:
        """Requests that were not answered in time."""
        return self.requests - self.in_time

    @property
    def attainment(self) -> float:
        return self.in_time / self.requests if self.requests else 1.0

    def wait_s(self, part: float) -> float:
        """A quantile of the waits; sort them first."""
        return (
            self.waits[min(int(part * len(self.waits)), len(self.waits) - 1)] if self.waits else 0.0
        )


class _Kind(NamedTuple):
    """Of a shape: its work, what it takes alone at best, and what of each pool's replica."""

    work_s: float
    alone_s: float
    size: int
    steps: int
    row_s: tuple[float, ...]


class _Request(NamedTuple):
    at: float
    kind: _Kind


def image_of(shape: RequestShape) -> ImageShape:
    rows = 1 + (shape.guidance > 1)
    return ImageShape(shape.width, shape.height, TEXT_TOKENS, rows, shape.steps)


class Simulation:
    """See the module's text.

    `sites`: a model's pools by name, preferred first; `unit`: what an image is counted as, by
    default its cost in the first of them.
    """

    def __init__(
        self,
        sites: Mapping[str, SimulatedPool],
        policy: Policy,
        seed: int = 0,
        unit: CostCoefficients | None = None,
    ) -> None:
        self._policy, self._seed = policy, seed
        self._names = tuple(sites)
        self._sites = list(sites.values())
        self._unit = unit or self._sites[0].costs
        self._events: list[tuple[float, int, Any, Any]] = []
        self._number = 0
        self._queue = FairQueue()
        self._kinds: dict[RequestShape, _Kind] = {}
        self._queued_s = 0.0
        self._open: list[list[SimulatedReplica]] = [[] for _ in sites]  # that may draw
        self._running = [0] * len(self._sites)
        self._chance = random.Random(seed)
        self._outcome = SimulationResult()
        self._requests = self._done = 0
        self._waits = array("f")
        self._arrived_s = self._squares = 0.0
        self._fleets = [
            PoolFleet(i, site.pool, site.machine, site.costs.step, self, f"{seed}-{i}")
            for i, site in enumerate(self._sites)
        ]

    def run(self, workload: Workload, warm_up_s: float = 0.0) -> SimulationResult:
        """What happens within `warm_up_s` is not counted."""
        self._counted_from = warm_up_s
        for fleet in self._fleets if warm_up_s else ():
            self.later(warm_up_s, fleet.forget)
        arrivals = iter(workload.arrivals(self._seed))
        upcoming: Arrival | None = next(arrivals, None)
        next_tick, events = 0.0, self._events
        every = max(int(workload.seconds / TICK_S / POINTS), 1)
        ticks, seen_s = 0, 0.0
        while True:
            at = upcoming.at if upcoming else float("inf")
            if events and events[0][0] < at:
                at = events[0][0]
            if next_tick <= at:
                now = next_tick
                self._tick(now)
                if ticks % every == 0:
                    arriving = (self._arrived_s - seen_s) / (every * TICK_S)
                    seen_s = self._arrived_s
                    self._note(now, arriving)
                ticks, next_tick = ticks + 1, next_tick + TICK_S
                finished = upcoming is None and self._done == self._requests
                if now >= workload.seconds and (finished or now > workload.seconds + PATIENCE_S):
                    return self._close(now)
            elif upcoming and upcoming.at <= at:
                self._arrive(upcoming)
                upcoming = next(arrivals, None)
            else:
                at, _, what, plan = heapq.heappop(events)
                if plan is None:
                    what(at)
                elif what.plan == plan:
                    self._end(what, at)

    # -- requests -------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        kind = self._kinds.get(arrival.shape) or self._kind(arrival.shape)
        self._outcome.requests += arrival.at >= self._counted_from
        self._requests += 1
        self._arrived_s += kind.work_s
        self._squares += kind.work_s**2
        self._submit(Item(arrival.tenant, kind.work_s, self._names, _Request(arrival.at, kind)))
        self._grant(arrival.at)

    def _submit(self, item: Item) -> None:
        self._queued_s += item.work_s
        self._queue.add(item)

    def _grant(self, now: float) -> None:
        for i, name in enumerate(self._names):
            slots = self._sites[i].pool.slots
            while len(self._queue) and self._running[i] < slots * len(self._open[i]):
                item = self._queue.first(name)
                if item is None:
                    break
                self._queue.take(item, name)
                self._queued_s -= item.work_s
                self._draw(i, item, now)

    def _draw(self, i: int, item: Item, now: float) -> None:
        replica = self._routed(i)
        kind: _Kind = item.what.kind
        self._running[i] += 1
        replica.advance(now)
        replica.join((item, now), kind.size, kind.row_s[i], kind.steps)
        self._plan(replica)

    def _routed(self, i: int) -> SimulatedReplica:
        """The emptier of two, as Ray Serve's router chooses; if both are full, others."""
        replicas, slots = self._open[i], self._sites[i].pool.slots
        many = len(replicas)
        for _ in range(4):
            a = replicas[int(self._chance.random() * many)]
            b = replicas[int(self._chance.random() * many)]
            best = a if len(a.running) <= len(b.running) else b
            if len(best.running) < slots:
                return best
        return min(replicas, key=lambda replica: len(replica.running))

    def _plan(self, replica: SimulatedReplica) -> None:
        replica.plan += 1
        if replica.running:
            self._number += 1
            heapq.heappush(self._events, (replica.ends_at, self._number, replica, replica.plan))

    def _end(self, replica: SimulatedReplica, now: float) -> None:
        i = replica.pool
        replica.advance(now)
        image = replica.next
        replica.leave(image)
        item, granted = image.what
        self._running[i] -= not replica.draining
        self._queue.settle(item.tenant, self._names[i], 0.0)
        self._plan(replica)
        request: _Request = item.what
        self._done += 1
        if request.at >= self._counted_from:
            self._waits.append(granted - request.at)
            self._outcome.in_time += now - request.at <= IN_TIME_SLOWDOWN * request.kind.alone_s
        if replica.draining and not replica.running:
            self._fleets[i].end(replica, now)
        if len(self._queue):
            self._grant(now)

    def _kind(self, shape: RequestShape) -> _Kind:
        image = image_of(shape)
        row_s = [site.costs.work_s(image) / shape.steps - site.costs.step for site in self._sites]
        alone_s = min(site.costs.work_s(image) for site in self._sites)
        kind = _Kind(
            self._unit.work_s(image), alone_s, image.image_tokens, shape.steps, tuple(row_s)
        )
        self._kinds[shape] = kind
        return kind

    # -- replicas -------------------------------------------------------------------------------

    def later(self, at: float, do: Callable[[float], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, do, None))

    def ready(self, replica: SimulatedReplica, now: float) -> None:
        self._open[replica.pool].append(replica)
        self._grant(now)

    def lost(self, replica: SimulatedReplica, now: float) -> None:
        """What it drew is drawn again elsewhere."""
        replica.plan += 1
        for image in list(replica.running):
            replica.leave(image)
            item, _ = image.what
            self._queue.settle(item.tenant, self._names[replica.pool], -item.work_s)
            self._outcome.retried += 1
            self._submit(Item(item.tenant, item.work_s, item.pools, item.what))
        self._grant(now)

    def withdrawn(self, replica: SimulatedReplica) -> None:
        """It draws what it has, and gets no more."""
        if replica.ready:
            self._open[replica.pool].remove(replica)
            self._running[replica.pool] -= len(replica.running)

    # -- the policy -----------------------------------------------------------------------------

    def _view(self, now: float) -> PolicyView:
        oldest = next(iter(self._queue), None)
        wait_s = now - oldest.what.at if oldest else 0.0
        queued_s = self._queued_s if oldest else 0.0
        demand = Demand(self._names, self._arrived_s, self._squares, queued_s, wait_s)
        supplies = {
            name: Supply(len(replicas))
            for name, replicas in zip(self._names, self._open, strict=True)
        }
        running = dict(zip(self._names, self._running, strict=True))
        return PolicyView(Load([demand], supplies), running, len(self._queue))

    def _tick(self, now: float) -> None:
        wanted = self._policy(self._view(now), now)
        for name, fleet in zip(self._names, self._fleets, strict=True):
            replicas = min(max(wanted[name], fleet.pool.min_replicas), fleet.pool.max_replicas)
            if replicas != fleet.wanted:
                if now >= self._counted_from:
                    self._outcome.ups += replicas > fleet.wanted
                    self._outcome.downs += replicas < fleet.wanted
                fleet.want(replicas, now)

    def _note(self, now: float, arriving: float) -> None:
        wanted = sum(fleet.wanted for fleet in self._fleets)
        ready = sum(map(len, self._open))
        self._outcome.timeline.append(TimelinePoint(now, arriving, len(self._queue), wanted, ready))

    def _close(self, now: float) -> SimulationResult:
        outcome = self._outcome
        for fleet in self._fleets:
            fleet.close(now)
            usd = fleet.bill.node_s / 3600 * fleet.machine.usd_h
            outcome.usd += usd
            outcome.usd_by_card[fleet.machine.card] = (
                outcome.usd_by_card.get(fleet.machine.card, 0.0) + usd
            )
            outcome.replica_h += fleet.bill.replica_s / 3600
            outcome.starts += fleet.bill.starts
        # Who still waits has waited so long at least.
        self._waits.extend(now - item.what.at for item in self._queue)
        outcome.waits = sorted(self._waits)
        return outcome
