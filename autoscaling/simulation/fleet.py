"""Simulated replicas on simulated nodes: their starts, stops, failures and cost.

A replica that runs several images does one step of each in turn. One turn through all its images is
a *round*. Images of one size share the constant part of a step. So all images of a replica take
their steps at the same pace, and a clock that counts rounds tells when each image is done.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..load import PoolBounds
from .shared_volume import SharedVolume

STORM_TAKES = 0.5


@dataclass(frozen=True, slots=True)
class NodeType:
    """The kind of nodes on which a pool runs.

    - `card`, `usd_h`, `per_node`: the card's id, US dollars per hour of a node, and replicas per
      node. A node is paid for from its order on.
    - `node_s`: seconds from the order of a node until it is up and has the container image.
    - `idle_s`: seconds after which an empty node is given back.
    - `start_s`: mean seconds of a replica's start on a node that has the weights; starts vary by
      ±20 %.
    - `weights_gib`: what a node copies from a volume before its first replica starts; its other
      replicas wait for the copy. `volume_gib_s`: how much all readers of the volume get together
      in a second.
    - `compile_s`: seconds that a node then compiles, before its first replica starts.
    - `replica_fails_s`, `node_taken_s`: mean seconds until a replica fails, and until the provider
      gives notice that it takes a node away; None: never.
    - `notice_s`: seconds between the provider's notice and the end of the node.
    - `storm_s`: mean seconds between two storms; None: there are none. In a storm the provider
      gives notice for each node with the probability `STORM_TAKES`.
    """

    card: str
    usd_h: float
    per_node: int = 1
    node_s: float = 90.0
    idle_s: float = 60.0
    start_s: float = 30.0
    weights_gib: float = 0.0
    volume_gib_s: float = 1.0
    compile_s: float = 0.0
    replica_fails_s: float | None = None
    node_taken_s: float | None = None
    notice_s: float = 120.0
    storm_s: float | None = None

    @property
    def first_start_s(self) -> float:
        """Mean seconds from the order of a node to its first ready replica, if it copies alone."""
        copy_s = self.weights_gib / self.volume_gib_s
        return self.node_s + copy_s + self.compile_s + self.start_s


class SimulatedNode:
    """A node; `leaving`: the provider has announced that it takes the node away.

    `prepared`: it has weights and compiled code. `waiting`: replicas that start when it has.
    """

    def __init__(self, ordered: float, *, prepared: bool) -> None:
        self.ordered, self.prepared = ordered, prepared
        self.up = self.leaving = self.gone = False
        self.waiting: list[SimulatedReplica] = []
        self.reader: int | None = None  # its number as a reader of the volume
        self.replicas: list[SimulatedReplica] = []
        self.empty_since = ordered


@dataclass(slots=True, eq=False)
class SimulatedImage:
    """An image that a replica generates.

    `size`: its number of image tokens. `row_s`: the seconds that the image adds to a round. `ends`:
    the count of rounds at which the image is done.
    """

    request: Any
    size: int
    row_s: float
    ends: float


class SimulatedReplica:
    """A replica of a pool and its clock, which counts rounds.

    `pool`: the number of its pool. `began`: the time from which the seconds of the replica are
    counted. `draining`: the replica gets no new images. `step_s`: the constant part of a step, in
    seconds.
    """

    def __init__(self, pool: int, began: float, step_s: float) -> None:
        self.node: SimulatedNode | None = None
        self.pool, self.began = pool, began
        self.ready = self.draining = self.stopped = False
        self.running: list[SimulatedImage] = []
        self.plan = 0  # number of the newest planned end; older plans are void
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
        """Begin an image of `steps` steps; `size` and `row_s`: see `SimulatedImage`."""
        self.running.append(SimulatedImage(request, size, row_s, self._rounds + steps))
        self._sizes[size] += 1
        self._row_s += row_s

    def leave(self, image: SimulatedImage) -> None:
        """Remove an image that is done or that the replica has lost."""
        self.running.remove(image)
        self._row_s = self._row_s - image.row_s if self.running else 0.0
        self._sizes[image.size] -= 1
        if not self._sizes[image.size]:
            del self._sizes[image.size]

    @property
    def next(self) -> SimulatedImage:
        """The running image that will be done first."""
        return min(self.running, key=lambda image: image.ends)

    @property
    def ends_at(self) -> float:
        """The time at which `next` is done, if no image joins or leaves before."""
        return self._at + max(self.next.ends - self._rounds, 0.0) * self._round_s

    @property
    def all_done_at(self) -> float:
        """The time at which it would be done with its images, if they ran one after the other."""
        left = ((image.ends - self._rounds) * image.row_s for image in self.running)
        return self._at + sum(left) if self.running else self._at

    @property
    def _round_s(self) -> float:
        return self._row_s + self._step_s * len(self._sizes)


@dataclass(slots=True)
class FleetCost:
    """The seconds of all replicas, the seconds of all nodes, and the number of replica starts."""

    replica_s: float = 0.0
    node_s: float = 0.0
    starts: int = 0


class SimulationClock(Protocol):
    """The part of `Simulation` that a fleet uses."""

    def later(self, at: float, do: Callable[[float], None]) -> None:
        """Call `do` at the time `at`."""

    def ready(self, replica: SimulatedReplica, now: float) -> None:
        """Let a replica get images from now on."""

    def withdrawn(self, replica: SimulatedReplica) -> None:
        """Give a replica no new images; it finishes those that it has."""

    def lost(self, replica: SimulatedReplica, now: float) -> None:
        """Take back the images of a withdrawn replica that has died."""


class PoolFleet:
    """The replicas and nodes of one pool.

    `number`: the pool's number in the simulation. `step_s`: the constant part of a step, in
    seconds. `volume`: where its nodes get weights from.
    """

    def __init__(
        self,
        number: int,
        pool: PoolBounds,
        node_type: NodeType,
        step_s: float,
        clock: SimulationClock,
        volume: SharedVolume,
        seed: str,
    ) -> None:
        self.pool, self.node_type, self.cost = pool, node_type, FleetCost()
        self._number, self._step_s, self._clock = number, step_s, clock
        self._later = clock.later
        self._volume = volume
        self._chance = random.Random(seed)
        self.replicas: list[SimulatedReplica] = []  # all that are not draining
        self.nodes: list[SimulatedNode] = []
        self.wanted = 0
        self._plan_storm(0.0)

    def want(self, replicas: int, now: float) -> None:
        """Start or stop replicas until `replicas` are there or starting."""
        self.wanted = replicas
        while len(self.replicas) < replicas:
            self.replicas.append(replica := SimulatedReplica(self._number, now, self._step_s))
            self.cost.starts += 1
            self._place(replica, now)
        while len(self.replicas) > replicas:
            self.stop(min(self.replicas, key=self._stop_order), now)

    def stop(self, replica: SimulatedReplica, now: float) -> None:
        """Give a replica no new images, and end it as soon as it runs none."""
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
        """Set all costs to zero, so that only costs after `now` count."""
        self.cost = FleetCost()
        for node in self.nodes:
            node.ordered = now
            for replica in node.replicas:
                replica.began = now

    def paid_s(self, now: float) -> float:
        """The seconds of all nodes until `now`."""
        return self.cost.node_s + sum(now - node.ordered for node in self.nodes)

    def close(self, now: float) -> None:
        """End the simulation: count the cost of all nodes and replicas until `now`."""
        self.cost.node_s = self.paid_s(now)
        for node in self.nodes:
            self.cost.replica_s += sum(now - replica.began for replica in node.replicas)

    def _stop_order(self, replica: SimulatedReplica) -> tuple[bool, int, float]:
        """Sort key for the replica to stop first.

        The order is Ray Serve's: replicas that are not ready, then those on the emptiest node, then
        the newest ones.
        """
        node = replica.node
        return replica.ready, len(node.replicas) if node else 0, -replica.began

    def _place(self, replica: SimulatedReplica, now: float) -> None:
        """Place a replica on the fullest node that has a place left, otherwise on a new node."""
        with_place = [
            n for n in self.nodes if not n.leaving and len(n.replicas) < self.node_type.per_node
        ]
        node = max(with_place, key=lambda n: (n.up, len(n.replicas)), default=None)
        if node is None:
            must_prepare = self.node_type.weights_gib or self.node_type.compile_s
            node = SimulatedNode(now, prepared=not must_prepare)
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
        node = replica.node
        if node is None or node.prepared:
            self._load(replica, now)
            return
        node.waiting.append(replica)
        if len(node.waiting) == 1:
            node.reader = self._volume.read(
                self.node_type.weights_gib,
                lambda at: self._later(
                    at + self.node_type.compile_s, lambda at: self._prepared(node, at)
                ),
                now,
            )

    def _prepared(self, node: SimulatedNode, now: float) -> None:
        node.prepared = True
        for replica in node.waiting:
            self._load(replica, now)
        node.waiting.clear()

    def _load(self, replica: SimulatedReplica, now: float) -> None:
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
        """Let a replica die; Ray Serve starts another one in its place."""
        if replica.stopped:
            return
        self._kill(replica, now)
        self.want(self.wanted, now)

    def _kill(self, replica: SimulatedReplica, now: float) -> None:
        if not replica.draining:
            self._withdraw(replica)
        self._clock.lost(replica, now)
        self.end(replica, now)

    def _plan_storm(self, now: float) -> None:
        if self.node_type.storm_s:
            at = now + self._chance.expovariate(1 / self.node_type.storm_s)
            self._later(at, self._storm)

    def _storm(self, now: float) -> None:
        """Let the provider take many nodes at once."""
        for node in list(self.nodes):
            if node.up and not node.leaving and self._chance.random() < STORM_TAKES:
                self._notice(node, now)
        self._plan_storm(now)

    def _notice(self, node: SimulatedNode, now: float) -> None:
        """Let the provider announce that it takes a node away.

        The node's replicas are drained, and others are started in their place.
        """
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
            if node.reader is not None and not node.prepared:
                self._volume.give_up(node.reader, now)
            self.nodes.remove(node)
            self.cost.node_s += now - node.ordered
