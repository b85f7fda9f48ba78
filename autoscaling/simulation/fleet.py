"""Simulated replicas on simulated nodes: starts, stops, failures, and what they cost.

A replica with several images does one step of each in turn; images of one size share the constant
part of a step. So all of its images take their steps at the same pace, and a clock that counts
rounds tells when each image is done.

Pure: imports the standard library and pure files only.
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
    """The nodes of a pool, each with one card; times in seconds, None: never.

    Nodes are paid for from the moment that they are ordered. `node_s`: from the order until the node
    is there. `idle_s`: until an empty node is given back. `start_s`: a replica's start on a node,
    give or take a fifth. `replica_fails_s`, `node_taken_s`: mean times until a replica fails and
    until the provider takes a node away; `notice_s`: how long before that it says so.
    """

    card: str
    usd_h: float
    per_node: int = 1
    node_s: float = 90.0
    idle_s: float = 60.0
    start_s: float = 30.0
    replica_fails_s: float | None = None
    node_taken_s: float | None = None
    notice_s: float = 120.0


class SimulatedNode:
    """A node; it is `leaving` once the provider has said that it takes it away."""

    def __init__(self, ordered: float) -> None:
        self.ordered = ordered
        self.up = self.leaving = self.gone = False
        self.replicas: list[SimulatedReplica] = []
        self.empty_since = ordered


@dataclass(slots=True, eq=False)
class SimulatedImage:
    """An image that a replica generates; it is done when the replica's clock is at `ends`.

    `row_s`: the seconds that it adds to a round.
    """

    request: Any
    size: int
    row_s: float
    ends: float


class SimulatedReplica:
    """A replica of a pool; `draining`: it gets no new images."""

    def __init__(self, pool: int, began: float, step_s: float) -> None:
        self.node: SimulatedNode | None = None
        self.pool, self.began = pool, began
        self.ready = self.draining = self.stopped = False
        self.running: list[SimulatedImage] = []
        self.plan = 0  # number of the planned end that holds
        self._step_s = step_s
        self._sizes: Counter[int] = Counter()
        self._row_s = 0.0
        self._rounds, self._at = 0.0, began

    def advance(self, now: float) -> None:
        """Move the clock to `now`; call it before images join or leave."""
        if self.running:
            self._rounds += (now - self._at) / self._round_s
        self._at = now

    def join(self, request: Any, size: int, row_s: float, steps: int) -> None:
        """Begin an image of `steps` steps."""
        self.running.append(SimulatedImage(request, size, row_s, self._rounds + steps))
        self._sizes[size] += 1
        self._row_s += row_s

    def leave(self, image: SimulatedImage) -> None:
        """End an image."""
        self.running.remove(image)
        self._row_s = self._row_s - image.row_s if self.running else 0.0
        self._sizes[image.size] -= 1
        if not self._sizes[image.size]:
            del self._sizes[image.size]

    @property
    def next(self) -> SimulatedImage:
        """The image that is done first."""
        return min(self.running, key=lambda image: image.ends)

    @property
    def ends_at(self) -> float:
        """When `next` is done, if no image joins."""
        return self._at + max(self.next.ends - self._rounds, 0.0) * self._round_s

    @property
    def _round_s(self) -> float:
        return self._row_s + self._step_s * len(self._sizes)


@dataclass(slots=True)
class FleetCost:
    """Seconds of replicas and of nodes, and the number of replica starts."""

    replica_s: float = 0.0
    node_s: float = 0.0
    starts: int = 0


class SimulationClock(Protocol):
    """The simulation that a fleet belongs to."""

    def later(self, at: float, do: Callable[[float], None]) -> None:
        """Call `do` at a time."""

    def ready(self, replica: SimulatedReplica, now: float) -> None:
        """A replica may get images from now on."""

    def withdrawn(self, replica: SimulatedReplica) -> None:
        """A replica gets no new images; it finishes those that it has."""

    def lost(self, replica: SimulatedReplica, now: float) -> None:
        """A withdrawn replica dies with its images."""


class PoolFleet:
    """The replicas of one pool and its nodes."""

    def __init__(
        self,
        number: int,
        pool: PoolBounds,
        node_type: NodeType,
        step_s: float,
        clock: SimulationClock,
        seed: str,
    ) -> None:
        self.pool, self.node_type, self.cost = pool, node_type, FleetCost()
        self._number, self._step_s, self._clock = number, step_s, clock
        self._later = clock.later
        self._chance = random.Random(seed)
        self.replicas: list[SimulatedReplica] = []  # without draining ones
        self.nodes: list[SimulatedNode] = []
        self.wanted = 0

    def want(self, replicas: int, now: float) -> None:
        """Start or stop replicas until there are as many as wanted."""
        self.wanted = replicas
        while len(self.replicas) < replicas:
            self.replicas.append(replica := SimulatedReplica(self._number, now, self._step_s))
            self.cost.starts += 1
            self._place(replica, now)
        while len(self.replicas) > replicas:
            self.stop(min(self.replicas, key=self._dispensable), now)

    def stop(self, replica: SimulatedReplica, now: float) -> None:
        """Give a replica no new images, and end it when its images are done."""
        self._withdraw(replica)
        if not replica.running:
            self.end(replica, now)

    def _withdraw(self, replica: SimulatedReplica) -> None:
        self.replicas.remove(replica)
        self._clock.withdrawn(replica)
        replica.draining = True

    def end(self, replica: SimulatedReplica, now: float) -> None:
        """End a replica at once."""
        replica.stopped = True
        if node := replica.node:
            self.cost.replica_s += now - replica.began
            node.replicas.remove(replica)
            if not node.replicas:
                node.empty_since = now
                self._later(now + self.node_type.idle_s, lambda at: self._give_back(node, at))

    def forget(self, now: float) -> None:
        """Forget all cost before `now`."""
        self.cost = FleetCost()
        for node in self.nodes:
            node.ordered = now
            for replica in node.replicas:
                replica.began = now

    def close(self, now: float) -> None:
        """End the simulation: what is still there is paid for until `now`."""
        for node in self.nodes:
            self.cost.node_s += now - node.ordered
            self.cost.replica_s += sum(now - replica.began for replica in node.replicas)

    def _dispensable(self, replica: SimulatedReplica) -> tuple[bool, int, float]:
        """Sort key of the replica to stop, as Ray Serve: not ready, on the emptiest node, newest."""
        node = replica.node
        return replica.ready, len(node.replicas) if node else 0, -replica.began

    def _place(self, replica: SimulatedReplica, now: float) -> None:
        """Place a replica on the fullest node with room, otherwise on a new one."""
        room = [
            n for n in self.nodes if not n.leaving and len(n.replicas) < self.node_type.per_node
        ]
        node = max(room, key=lambda n: (n.up, len(n.replicas)), default=None)
        if node is None:
            node = SimulatedNode(now)
            self.nodes.append(node)
            fresh = node
            self._later(now + self.node_type.node_s, lambda at: self._node_up(fresh, at))
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
            self._later(now + self.node_type.idle_s, lambda at: self._give_back(node, at))
        if self.node_type.node_taken_s:
            taken = now + self._chance.expovariate(1 / self.node_type.node_taken_s)
            self._later(taken, lambda at: self._notice(node, at))

    def _start(self, replica: SimulatedReplica, now: float) -> None:
        takes_s = self.node_type.start_s * self._chance.uniform(0.8, 1.2)
        self._later(now + takes_s, lambda at: self._started(replica, at))

    def _started(self, replica: SimulatedReplica, now: float) -> None:
        if replica.stopped:
            return
        replica.ready = True
        replica.advance(now)
        if self.node_type.replica_fails_s:
            fails = now + self._chance.expovariate(1 / self.node_type.replica_fails_s)
            self._later(fails, lambda at: self._fail(replica, at))
        self._clock.ready(replica, now)

    def _fail(self, replica: SimulatedReplica, now: float) -> None:
        """A replica dies; Ray Serve starts another one in its place."""
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
        """The provider announces to take a node: its replicas drain, and others are started."""
        if node.gone:
            return
        node.leaving = True
        for replica in list(node.replicas):
            if replica in self.replicas:
                self.stop(replica, now)
        self.want(self.wanted, now)
        self._later(now + self.node_type.notice_s, lambda at: self._taken(node, at))

    def _taken(self, node: SimulatedNode, now: float) -> None:
        for replica in list(node.replicas):
            self._kill(replica, now)
        self._remove(node, now)

    def _give_back(self, node: SimulatedNode, now: float) -> None:
        idle = not node.replicas and now - node.empty_since >= self.node_type.idle_s - 1e-6
        if node.up and idle and not node.leaving:
            self._remove(node, now)

    def _remove(self, node: SimulatedNode, now: float) -> None:
        if not node.gone:
            node.gone = True
            self.nodes.remove(node)
            self.cost.node_s += now - node.ordered
