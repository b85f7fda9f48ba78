"""A simulation of a fleet under a workload and a policy: its cost, and how long requests wait.

The simulation runs event by event. Requests wait in a queue that the caller hands in, in practice
Octet's fair queue. `cluster.cost` computes the work of a request. Once per second the policy is
told what the Dispatcher would tell it. `dispatch` chooses the replica of each request, and `fleet`
simulates replicas and nodes. The same seed gives the same result.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from cluster.cost import CostCoefficients, ImageShape

from ..load import Demand, Load, PoolBounds, Supply
from .dispatch import FirstDone, OpenReplicas
from .fleet import NodeType, PoolFleet, SimulatedReplica
from .shared_volume import SharedVolume
from .workloads import Arrival, RequestShape, Workload

TICK_S = 1.0
WATCH_TICKS = 60
PATIENCE_S = 3600.0  # seconds after the workload's end in which requests may still be finished
# An answer is in time within this many times the seconds that the image takes alone.
IN_TIME_SLOWDOWN = 5.0
TEXT_TOKENS = 333
MONDAY_S = 4 * 86400.0  # the time of day at which simulations begin, in seconds since 1970
POINTS = 2000  # a timeline has about this many points


@dataclass(frozen=True, slots=True)
class SimulatedPool:
    """A pool, the nodes that it runs on, and the cost of images on one of its replicas."""

    pool: PoolBounds
    node_type: NodeType
    costs: CostCoefficients


class PolicyView(NamedTuple):
    """Everything that a policy may know.

    `running`: requests that run in each pool. `waiting`: requests in the queue.
    """

    load: Load
    running: Mapping[str, int]
    waiting: int


Policy = Callable[[PolicyView, float], Mapping[str, int]]  # view and time → replicas by pool


class TimelinePoint(NamedTuple):
    """The whole fleet at one time.

    `arriving`: seconds of work that arrive per second. `queued`: waiting requests. `wanted` and
    `ready`: replicas.
    """

    at: float
    arriving: float
    queued: int
    wanted: int
    ready: int


@dataclass(slots=True)
class SimulationResult:
    """The counts of a simulation.

    - `requests`: requests that arrived.
    - `in_time`: requests that were answered in time.
    - `retried`: repetitions of requests after a replica died.
    - `waits`: seconds from each request to the grant that led to its image, sorted.
    - `usd`, `replica_h`: the cost in US dollars, and the hours of all replicas.
    - `starts`: the number of replica starts.
    - `ups`, `downs`: how often the number of wanted replicas rose and fell.
    """

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
        """The number of requests that were not answered in time."""
        return self.requests - self.in_time

    @property
    def attainment(self) -> float:
        """The share of requests that were answered in time."""
        return self.in_time / self.requests if self.requests else 1.0

    def wait_s(self, part: float) -> float:
        """The quantile `part`, 0 to 1, of the waits."""
        return (
            self.waits[min(int(part * len(self.waits)), len(self.waits) - 1)] if self.waits else 0.0
        )


class _ShapeCosts(NamedTuple):
    """The costs of a request shape.

    `work_s`: the work of such a request. `alone_s`: seconds that the image takes alone in the
    fastest pool. `size`: the number of its image tokens. `row_s`: for each pool, the seconds of one
    step on a replica, without the constant part of a step.
    """

    work_s: float
    alone_s: float
    size: int
    steps: int
    row_s: tuple[float, ...]


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """A request that arrives at the time `at`, and waits in a `RequestQueue` at first.

    `late_at`: from when it cannot be answered in time any more. The queue sets `number` and `late`.
    """

    tenant: str
    work_s: float
    pools: tuple[str, ...]
    at: float
    costs: _ShapeCosts
    granted_at: float = 0.0
    number: int = 0
    late: bool = False
    last: bool = False

    @property
    def since(self) -> float:
        return self.at

    @property
    def late_at(self) -> float:
        return self.at + (IN_TIME_SLOWDOWN - 1) * self.costs.alone_s


class RequestQueue(Protocol):
    """The part of `serve.dispatch.fair_queue.FairQueue` that the simulation uses."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[SimulatedRequest]: ...
    def add(self, item: SimulatedRequest) -> None: ...
    def first(self, pool: str, now: float) -> SimulatedRequest | None: ...
    def take(self, item: SimulatedRequest, pool: str) -> None: ...
    def settle(self, tenant: str, pool: str, correction_s: float) -> None: ...


def image_of(shape: RequestShape) -> ImageShape:
    """A request's shape in the form that the cost model takes."""
    rows = 1 + (shape.guidance > 1)
    return ImageShape(shape.width, shape.height, TEXT_TOKENS, rows, shape.steps)


class Simulation:
    """One run of a workload under a policy."""

    def __init__(
        self,
        pools: Mapping[str, SimulatedPool],
        policy: Policy,
        queue: RequestQueue,
        seed: int = 0,
        unit: CostCoefficients | None = None,
        choice: Callable[[int, random.Random], OpenReplicas] = FirstDone,
    ) -> None:
        """`pools`: a model's pools by name, preferred first. `queue`: an empty queue.

        `unit`: the cost of images on the reference replica, which defines their work. By default
        this is the cost in the first pool. `choice`: a class of `dispatch`.
        """
        self._policy, self._seed = policy, seed
        self._names = tuple(pools)
        self._pools = list(pools.values())
        self._unit = unit or self._pools[0].costs
        self._events: list[tuple[float, int, Any, Any]] = []
        self._number = 0
        self._queue = queue
        self._costs: dict[RequestShape, _ShapeCosts] = {}
        self._queued_s = 0.0
        chance = random.Random(seed)
        self._open = [choice(pool.pool.slots, chance) for pool in self._pools]
        self._running = [0] * len(self._pools)
        self._result = SimulationResult()
        self._requests = self._done = 0
        self._waits = array("f")
        self._arrived_s = self._squares = 0.0
        volume = SharedVolume(self._pools[0].node_type.volume_gib_s, self.later)
        self._fleets = [
            PoolFleet(i, pool.pool, pool.node_type, pool.costs.step, self, volume, f"{seed}-{i}")
            for i, pool in enumerate(self._pools)
        ]

    def run(
        self,
        workload: Workload,
        warm_up_s: float = 0.0,
        watch: Callable[[float, int], None] | None = None,
    ) -> SimulationResult:
        """Run the workload; nothing that happens in the first `warm_up_s` seconds is counted.

        `watch`: called every `WATCH_TICKS` from then on, with the cost so far, in US dollars, and
        the requests so far that were answered too late. It may raise an exception to end the
        simulation.
        """
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
                if watch and now > warm_up_s and ticks % WATCH_TICKS == 0:
                    watch(self._usd(now), len(self._waits) - self._result.in_time)
                if ticks % every == 0:
                    arriving = (self._arrived_s - seen_s) / (every * TICK_S)
                    seen_s = self._arrived_s
                    self._add_point(now, arriving)
                ticks, next_tick = ticks + 1, next_tick + TICK_S
                finished = upcoming is None and self._done == self._requests
                if now >= workload.seconds and (finished or now > workload.seconds + PATIENCE_S):
                    return self._close(now)
            elif upcoming and upcoming.at <= at:
                self._arrive(upcoming)
                upcoming = next(arrivals, None)
            else:
                # An event is a callback, or the planned end of a replica's next image.
                at, _, target, plan = heapq.heappop(events)
                if plan is None:
                    target(at)
                elif target.plan == plan:
                    self._end(target, at)

    # -- requests -------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        costs = self._costs.get(arrival.shape) or self._shape_costs(arrival.shape)
        self._result.requests += arrival.at >= self._counted_from
        self._requests += 1
        self._arrived_s += costs.work_s
        self._squares += costs.work_s**2
        self._submit(SimulatedRequest(arrival.tenant, costs.work_s, self._names, arrival.at, costs))
        self._grant(arrival.at)

    def _submit(self, request: SimulatedRequest) -> None:
        self._queued_s += request.work_s
        self._queue.add(request)

    def _grant(self, now: float) -> None:
        """Start queued requests while there are free slots, in the preferred pools first."""
        for i, name in enumerate(self._names):
            slots = self._pools[i].pool.slots
            while len(self._queue) and self._running[i] < slots * len(self._open[i]):
                request = self._queue.first(name, now)
                if request is None:
                    break
                self._queue.take(request, name)
                self._queued_s -= request.work_s
                self._start(i, request, now)

    def _start(self, i: int, request: SimulatedRequest, now: float) -> None:
        replica = self._open[i].choose()
        request.granted_at = now
        costs = request.costs
        self._running[i] += 1
        replica.advance(now)
        replica.join(request, costs.size, costs.row_s[i], costs.steps)
        self._open[i].changed(replica)
        self._plan_end(replica)

    def _plan_end(self, replica: SimulatedReplica) -> None:
        """Plan the end of a replica's next image; its older plans become void."""
        replica.plan += 1
        if replica.running:
            self._number += 1
            heapq.heappush(self._events, (replica.ends_at, self._number, replica, replica.plan))

    def _end(self, replica: SimulatedReplica, now: float) -> None:
        """End the image of `replica` that is done at the time `now`."""
        i = replica.pool
        replica.advance(now)
        image = replica.next
        replica.leave(image)
        self._open[i].changed(replica)
        request: SimulatedRequest = image.request
        self._running[i] -= not replica.draining
        self._queue.settle(request.tenant, self._names[i], 0.0)
        self._plan_end(replica)
        self._done += 1
        if request.at >= self._counted_from:
            self._waits.append(request.granted_at - request.at)
            self._result.in_time += now - request.at <= IN_TIME_SLOWDOWN * request.costs.alone_s
        if replica.draining and not replica.running:
            self._fleets[i].end(replica, now)
        if len(self._queue):
            self._grant(now)

    def _shape_costs(self, shape: RequestShape) -> _ShapeCosts:
        image = image_of(shape)
        row_s = [pool.costs.work_s(image) / shape.steps - pool.costs.step for pool in self._pools]
        alone_s = min(pool.costs.work_s(image) for pool in self._pools)
        self._costs[shape] = costs = _ShapeCosts(
            self._unit.work_s(image), alone_s, image.image_tokens, shape.steps, tuple(row_s)
        )
        return costs

    # -- replicas -------------------------------------------------------------------------------

    def later(self, at: float, do: Callable[[float], None]) -> None:
        """Call `do` at the time `at`."""
        self._number += 1
        heapq.heappush(self._events, (at, self._number, do, None))

    def ready(self, replica: SimulatedReplica, now: float) -> None:
        """Let a replica get images from now on."""
        self._open[replica.pool].add(replica)
        self._grant(now)

    def lost(self, replica: SimulatedReplica, now: float) -> None:
        """Queue the images of a dead replica again."""
        replica.plan += 1
        for image in list(replica.running):
            replica.leave(image)
            request: SimulatedRequest = image.request
            self._queue.settle(request.tenant, self._names[replica.pool], -request.work_s)
            self._result.retried += 1
            self._submit(request)
        self._grant(now)

    def withdrawn(self, replica: SimulatedReplica) -> None:
        """Give a replica no new images; it finishes those that it has."""
        if replica.ready:
            self._open[replica.pool].remove(replica)
            self._running[replica.pool] -= len(replica.running)

    # -- the policy -----------------------------------------------------------------------------

    def _view(self, now: float) -> PolicyView:
        oldest = next(iter(self._queue), None)
        wait_s = now - oldest.at if oldest else 0.0
        queued_s = self._queued_s if oldest else 0.0
        demand = Demand(
            self._names, self._arrived_s, self._squares, queued_s, wait_s, self._requests
        )
        supplies = {
            name: Supply(len(replicas))
            for name, replicas in zip(self._names, self._open, strict=True)
        }
        running = dict(zip(self._names, self._running, strict=True))
        return PolicyView(
            Load([demand], supplies, unix_s=MONDAY_S + now), running, len(self._queue)
        )

    def _tick(self, now: float) -> None:
        """Ask the policy, and change the fleets to what it wants."""
        wanted = self._policy(self._view(now), now)
        for name, fleet in zip(self._names, self._fleets, strict=True):
            replicas = min(max(wanted[name], fleet.pool.min_replicas), fleet.pool.max_replicas)
            if replicas != fleet.wanted:
                if now >= self._counted_from:
                    self._result.ups += replicas > fleet.wanted
                    self._result.downs += replicas < fleet.wanted
                fleet.want(replicas, now)

    def _add_point(self, now: float, arriving: float) -> None:
        wanted = sum(fleet.wanted for fleet in self._fleets)
        ready = sum(map(len, self._open))
        self._result.timeline.append(TimelinePoint(now, arriving, len(self._queue), wanted, ready))

    def _usd(self, now: float) -> float:
        fleets = self._fleets
        return sum(f.paid_s(now) / 3600 * f.node_type.usd_h for f in fleets)

    def _close(self, now: float) -> SimulationResult:
        """End the simulation and add up its result."""
        result = self._result
        for fleet in self._fleets:
            fleet.close(now)
            usd = fleet.cost.node_s / 3600 * fleet.node_type.usd_h
            result.usd += usd
            result.usd_by_card[fleet.node_type.card] = (
                result.usd_by_card.get(fleet.node_type.card, 0.0) + usd
            )
            result.replica_h += fleet.cost.replica_s / 3600
            result.starts += fleet.cost.starts
        # Requests that still wait count with the time that they have waited so far.
        self._waits.extend(now - request.at for request in self._queue)
        result.waits = sorted(self._waits)
        return result
