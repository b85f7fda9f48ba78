"""Simulated replicas on simulated nodes: starts, stops, failures, and what they cost.

A replica that draws several images does one step of each in turn; images of one size share what a
step costs beside its rows. So all of its images do their steps at the same pace, and a clock that
counts rounds tells when each is done.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..load import PoolBounds


@dataclass(frozen=True, slots=True)
class NodeType:
    """The nodes of a pool, each one card; times in seconds, None: never.

    They are paid for from their order on. `node_s`: from the order of a node until it is there;
    `idle_s`: until an empty one is given back; `start_s`: of a replica on a node, give or take a
    fifth; `notice_s`: before a node is taken away.
    """

    card: str
    usd_h: float
    per_node: int = 1
    node_s: float = 90.0
    idle_s: float = 60.0
    start_s: float = 30.0
    replica_fails_s: float | None = None  # on average
    node_taken_s: float | None = None
    notice_s: float = 120.0


class SimulatedNode:
    def __init__(self, ordered: float) -> None:
        self.ordered = ordered
        self.up = self.leaving = self.gone = False
        self.replicas: list[SimulatedReplica] = []
        self.empty_since = ordered


@dataclass(slots=True, eq=False)
class SimulatedImage:
    """An image that a replica draws; it is done when the replica's clock is at `ends`."""

    what: Any
    size: int
    row_s: float  # of a round
    ends: float


class SimulatedReplica:
    def __init__(self, pool: int, began: float, step_s: float) -> None:
        self.node: SimulatedNode | None = None
        self.pool, self.began = pool, began
        self.ready = self.draining = self.stopped = False
        self.running: list[SimulatedImage] = []
        self.plan = 0  # which of the planned ends is the current one
        self._step_s = step_s
        self._sizes: Counter[int] = Counter()
        self._row_s = 0.0
        self._rounds, self._at = 0.0, began

    def advance(self, now: float) -> None:
        if self.running:
            self._rounds += (now - self._at) / self._round_s
        self._at = now

    def join(self, what: Any, size: int, row_s: float, steps: int) -> None:
        """After `advance`."""
        self.running.append(SimulatedImage(what, size, row_s, self._rounds + steps))
        self._sizes[size] += 1
        self._row_s += row_s

    def leave(self, image: SimulatedImage) -> None:
        self.running.remove(image)
        self._row_s = self._row_s - image.row_s if self.running else 0.0
        self._sizes[image.size] -= 1
        if not self._sizes[image.size]:
            del self._sizes[image.size]

    @property
    def next(self) -> SimulatedImage:
        return min(self.running, key=lambda image: image.ends)

    @property
    def ends_at(self) -> float:
        """When `next` is done, if nobody joins."""
        return self._at + max(self.next.ends - self._rounds, 0.0) * self._round_s

    @property
    def _round_s(self) -> float:
        return self._row_s + self._step_s * len(self._sizes)


@dataclass(slots=True)
class FleetCost:
    replica_s: float = 0.0
    node_s: float = 0.0
    starts: int = 0


class SimulationClock(Protocol):
    """Who runs the simulation, and hears of replicas."""

    def later(self, at: float, do: Callable[[float], None]) -> None: ...

    def ready(self, replica: SimulatedReplica, now: float) -> None:
        """It may draw from now on."""

    def withdrawn(self, replica: SimulatedReplica) -> None:
        """It draws what it has, and gets no more."""

    def lost(self, replica: SimulatedReplica, now: float) -> None:
        """It was withdrawn, and dies with what it draws."""


class PoolFleet:
    """The replicas of one pool and its nodes."""

    def __init__(
        self,
        number: int,
        pool: PoolBounds,
        machine: NodeType,
        step_s: float,
        clock: SimulationClock,
        seed: str,
    ) -> None:
        self.pool, self.machine, self.bill = pool, machine, FleetCost()
        self._number, self._step_s, self._clock = number, step_s, clock
        self._later = clock.later
        self._chance = random.Random(seed)
        self.replicas: list[SimulatedReplica] = []  # without those that drain
        self.nodes: list[SimulatedNode] = []
        self.wanted = 0

    def want(self, replicas: int, now: float) -> None:
        """Start or stop so many that there are as many as wanted."""
        self.wanted = replicas
        while len(self.replicas) < replicas:
            self.replicas.append(replica := SimulatedReplica(self._number, now, self._step_s))
            self.bill.starts += 1
            self._place(replica, now)
        while len(self.replicas) > replicas:
            self.stop(min(self.replicas, key=self._dispensable), now)

    def stop(self, replica: SimulatedReplica, now: float) -> None:
        """No new images; it ends when those that it draws are done."""
        self._withdraw(replica)
        if not replica.running:
            self.end(replica, now)

    def _withdraw(self, replica: SimulatedReplica) -> None:
        self.replicas.remove(replica)
        self._clock.withdrawn(replica)
        replica.draining = True

    def end(self, replica: SimulatedReplica, now: float) -> None:
        replica.stopped = True
        if node := replica.node:
            self.bill.replica_s += now - replica.began
            node.replicas.remove(replica)
            if not node.replicas:
                node.empty_since = now
                self._later(now + self.machine.idle_s, lambda at: self._give_back(node, at))

    def forget(self, now: float) -> None:
        """Count from now on."""
        self.bill = FleetCost()
        for node in self.nodes:
            node.ordered = now
            for replica in node.replicas:
                replica.began = now

    def close(self, now: float) -> None:
        """The end of the simulation: what is still there is paid for until now."""
        for node in self.nodes:
            self.bill.node_s += now - node.ordered
            self.bill.replica_s += sum(now - replica.began for replica in node.replicas)

    def _dispensable(self, replica: SimulatedReplica) -> tuple[bool, int, float]:
        """As Ray Serve: what is not ready first, then on the emptiest node, then the newest."""
        node = replica.node
        return replica.ready, len(node.replicas) if node else 0, -replica.began

    def _place(self, replica: SimulatedReplica, now: float) -> None:
        """On the fullest node with room; else on a new one."""
        room = [n for n in self.nodes if not n.leaving and len(n.replicas) < self.machine.per_node]
        node = max(room, key=lambda n: (n.up, len(n.replicas)), default=None)
        if node is None:
            node = SimulatedNode(now)
            self.nodes.append(node)
            fresh = node
            self._later(now + self.machine.node_s, lambda at: self._node_up(fresh, at))
        node.replicas.append(replica)
        replica.node, replica.began = node, now
        if node.up:
            self._start(replica, now)

    def _node_up(self, node: SimulatedNode, now: float) -> None:
        if node.gone:
            return
        node.up, node.empty_since = True, now
        for replica in node.replicas:
            self._start(replica, now)
        if not node.replicas:
            self._later(now + self.machine.idle_s, lambda at: self._give_back(node, at))
        if self.machine.node_taken_s:
            taken = now + self._chance.expovariate(1 / self.machine.node_taken_s)
            self._later(taken, lambda at: self._notice(node, at))

    def _start(self, replica: SimulatedReplica, now: float) -> None:
        takes_s = self.machine.start_s * self._chance.uniform(0.8, 1.2)
        self._later(now + takes_s, lambda at: self._started(replica, at))

    def _started(self, replica: SimulatedReplica, now: float) -> None:
        if replica.stopped:
            return
        replica.ready = True
        replica.advance(now)
        if self.machine.replica_fails_s:
            fails = now + self._chance.expovariate(1 / self.machine.replica_fails_s)
            self._later(fails, lambda at: self._fail(replica, at))
        self._clock.ready(replica, now)

    def _fail(self, replica: SimulatedReplica, now: float) -> None:
        """It dies; Ray Serve starts another one in its place."""
        if replica.stopped:
            return
        self._kill(replica, now)
        self.want(self.wanted, now)

    def _kill(self, replica: SimulatedReplica, now: float) -> None:
        if not replica.draining:
            self._withdraw(replica)
        self._clock.lost(replica, now)
        self.end(replica, now)

    def _notice(self, node: SimulatedNode, now: float) -> None:
        """A node is about to be taken away: its replicas draw no new images, others are started."""
        if node.gone:
            return
        node.leaving = True
        for replica in list(node.replicas):
            if replica in self.replicas:
                self.stop(replica, now)
        self.want(self.wanted, now)
        self._later(now + self.machine.notice_s, lambda at: self._taken(node, at))

    def _taken(self, node: SimulatedNode, now: float) -> None:
        for replica in list(node.replicas):
            self._kill(replica, now)
        self._remove(node, now)

    def _give_back(self, node: SimulatedNode, now: float) -> None:
        idle = not node.replicas and now - node.empty_since >= self.machine.idle_s - 1e-6
        if node.up and idle and not node.leaving:
            self._remove(node, now)

    def _remove(self, node: SimulatedNode, now: float) -> None:
        if not node.gone:
            node.gone = True
            self.nodes.remove(node)
            self.bill.node_s += now - node.ordered
