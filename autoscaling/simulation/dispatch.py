"""How simulated requests find a replica: as Octet's Dispatcher chooses, or as Ray Serve's router.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from .fleet import SimulatedReplica

PAIRS = 4  # that Ray's router tries before this file takes the emptiest replica


class OpenReplicas(Protocol):
    """The ready replicas of one pool that get new images, and the choice among them."""

    def __len__(self) -> int: ...

    def add(self, replica: SimulatedReplica) -> None:
        """Let a replica get images."""

    def remove(self, replica: SimulatedReplica) -> None:
        """Let a replica get no more images."""

    def changed(self, replica: SimulatedReplica) -> None:
        """Note that images have joined or left a replica."""

    def choose(self) -> SimulatedReplica:
        """The replica that gets the next image; at least one has a free slot."""


class FirstDone:
    """Octet's choice: the replica that would be done first with the work that it has."""

    def __init__(self, slots: int, chance: random.Random) -> None:
        """`slots`: of each replica; `chance` is not used."""
        self._slots = slots
        self._places: dict[SimulatedReplica, tuple[float, int]] = {}  # when done, and a number
        self._heap: list[tuple[float, int, SimulatedReplica]] = []  # current and stale places
        self._number = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, replica: SimulatedReplica) -> None:
        self._number += 1
        self._places[replica] = replica.all_done_at, self._number
        if len(replica.running) < self._slots:
            heappush(self._heap, (*self._places[replica], replica))
        if len(self._heap) > 2 * len(self._places) + 64:
            free = (r for r in self._places if len(r.running) < self._slots)
            self._heap = [(*self._places[r], r) for r in free]
            heapify(self._heap)

    def remove(self, replica: SimulatedReplica) -> None:
        self._places.pop(replica, None)

    def changed(self, replica: SimulatedReplica) -> None:
        if replica in self._places:
            self.add(replica)

    def choose(self) -> SimulatedReplica:
        while True:
            at, number, replica = self._heap[0]
            if self._places.get(replica) == (at, number):
                return replica
            heappop(self._heap)


class EmptierOfTwo:
    """Ray Serve's choice: the emptier of two random replicas.

    If both are full another pair is tried, up to `PAIRS`; then the emptiest replica is chosen.
    """

    def __init__(self, slots: int, chance: random.Random) -> None:
        """`slots`: of each replica."""
        self._slots, self._chance = slots, chance
        self._replicas: list[SimulatedReplica] = []

    def __len__(self) -> int:
        return len(self._replicas)

    def add(self, replica: SimulatedReplica) -> None:
        self._replicas.append(replica)

    def remove(self, replica: SimulatedReplica) -> None:
        self._replicas.remove(replica)

    def changed(self, replica: SimulatedReplica) -> None:
        pass

    def choose(self) -> SimulatedReplica:
        count = len(self._replicas)
        for _ in range(PAIRS):
            a = self._replicas[int(self._chance.random() * count)]
            b = self._replicas[int(self._chance.random() * count)]
            best = a if len(a.running) <= len(b.running) else b
            if len(best.running) < self._slots:
                return best
        return min(self._replicas, key=lambda replica: len(replica.running))


class Numbered(Protocol):
    """An item of a queue, which sets `number`."""

    number: int


T = TypeVar("T", bound=Numbered)


class FifoQueue(Generic[T]):
    """Requests in order of arrival, for all tenants and pools together, as in a Serve handle."""

    def __init__(self) -> None:
        self._items: dict[int, T] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def add(self, item: T) -> None:
        """Let an item wait behind all others."""
        self._arrivals += 1
        item.number = self._arrivals
        self._items[item.number] = item

    def first(self, pool: str, now: float) -> T | None:
        """The item that came first."""
        return next(iter(self._items.values()), None)

    def take(self, item: T, pool: str) -> None:
        """Serve an item."""
        del self._items[item.number]

    def settle(self, tenant: str, pool: str, correction_s: float) -> None:
        """Do nothing: no tenant is charged."""
