"""The replicas of one pool, their free slots, and the choice of the replica that runs an image.

A *slot* is room for one image. A replica reports how many it has. An image gets the replica that
would be done first with the work that it has already, which costs O(log replicas).

Replicas whose remaining work differs by less than `NEAR` of the image's own are equal. Of those the
image gets one that runs images of its size, because these share a batch; then one on the card with
the fewest images, because replicas of a card share its cores; then one that has generated its size
before, because its kernels for that size are loaded.

A replica is *leaving* if its node is being drained, or if Ray Serve is about to stop it. A leaving
replica gets no new images. Serve does not say which replicas it will stop, so this file assumes
Serve's own order: first those on the nodes with the fewest replicas, and there the newest.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from .protocol import Heartbeat, Lease, QueuedImage, RunningImage

NEAR = 0.1  # of an image's own work; a smaller difference of remaining work does not count
CANDIDATES = 8  # replicas that are compared at most
SLACK = 64  # a heap may hold so many keys more than twice the number of replicas

ImageKey = tuple[str, str]  # session and image id
_Key = tuple[float, int, str]  # when a replica is done, a number, its name


@dataclass(slots=True, eq=False)
class Replica:
    """A living replica.

    `reported`: its last heartbeat. `heartbeat`: the same, but with the slots that may be used.
    `due_at`: when its next heartbeat is due.
    `held`: the images that were granted a slot of it. `done_at`: when it would be done with them.
    `unheld`: leases in its last heartbeat that no session holds. `orphans`: those that were in the
    heartbeat before as well; they take slots all the same.
    `avoided_until`: it has refused an image, and gets no other before this time. `one_at_a_time`:
    its card has had a fault. `sizes`: of images that it has been given.
    """

    reported: Heartbeat
    heartbeat: Heartbeat
    first_heard: float
    due_at: float
    held: dict[ImageKey, RunningImage]
    done_at: float = -math.inf
    unheld: frozenset[Lease] = frozenset()
    orphans: frozenset[Lease] = frozenset()
    avoided_until: float = -math.inf
    one_at_a_time: bool = False
    leaving: bool = False
    free: int = 0
    key: _Key | None = None  # in the heap, while a slot is free
    sizes: set[str] = field(default_factory=set)

    @property
    def place(self) -> str:
        """The card that the replica shares with others; without a card, its node."""
        return self.heartbeat.card or self.heartbeat.node


@dataclass(slots=True)
class Capacity:
    """The sum of some replicas: their number and slots, and of their heartbeats' fields."""

    replicas: int = 0
    slots: int = 0
    speed: float = 0.0
    start_s: float = 0.0
    running_work_s: float = 0.0

    def add(self, heartbeat: Heartbeat, sign: int = 1) -> None:
        """Add a replica, or take it away with the `sign` -1."""
        self.replicas += sign
        self.slots += sign * heartbeat.slots
        self.speed += sign * heartbeat.speed
        self.start_s += sign * heartbeat.start_s
        self.running_work_s += sign * heartbeat.running_work_s
        if not self.replicas:  # removes rounding errors
            self.speed = self.start_s = self.running_work_s = 0.0


class _Excess(NamedTuple):
    """A decision to have fewer replicas, which Ray Serve carries out later.

    Only `staying` of the replicas that lived at the time `since` stay.
    """

    since: float
    staying: int


class PoolReplicas:
    """The living replicas of a pool, by name."""

    def __init__(self, on_card: Counter[str], on_node: Counter[str]) -> None:
        """`on_card`: the running images by `Replica.place`; `on_node`: the replicas by node.

        All pools share both.
        """
        self._on_card, self._on_node = on_card, on_node
        self._replicas: dict[str, Replica] = {}
        self._held: dict[str, dict[ImageKey, RunningImage]] = {}  # also of replicas not heard yet
        self._heap: list[_Key] = []  # of replicas with a free slot, current and stale
        self._keys = 0
        self._draining: Collection[str] = ()
        self._excess: _Excess | None = None
        self._staying = Capacity()
        self.free = 0  # slots of staying replicas
        self.running = 0  # images that hold a slot of any replica

    @property
    def living(self) -> int:
        """The number of living replicas."""
        return len(self._replicas)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def get(self, name: str) -> Replica | None:
        """The living replica of this name."""
        return self._replicas.get(name)

    @property
    def staying(self) -> Capacity:
        """The sum of the replicas that are not leaving."""
        return replace(self._staying)

    # -- what replicas report -------------------------------------------------------------------

    def hear(
        self,
        heartbeat: Heartbeat,
        now: float,
        running: Collection[Lease] = (),
        unheld: Collection[Lease] = (),
        *,
        one_at_a_time: bool = False,
        next_s: float = 0.0,
        slots: int | None = None,
    ) -> tuple[bool, bool]:
        """Note a replica's heartbeat; the next one is due in `next_s` seconds.

        `slots`: how many of its slots may be used; None: all.
        `running`: the leases that it runs. `unheld`: those of them that no session holds. They
        count when two heartbeats in a row have them, because an image may have ended just now.
        Returns whether it is the replica's first heartbeat, and whether a slot has become free.
        """
        reported = heartbeat
        if slots is not None and slots != heartbeat.slots:
            heartbeat = heartbeat._replace(slots=slots)
        replica = self._replicas.get(heartbeat.replica)
        if first := replica is None:
            held = self._held.setdefault(heartbeat.replica, {})
            replica = Replica(reported, heartbeat, now, now, held)
            self._replicas[heartbeat.replica] = replica
            self._on_node[heartbeat.node] += 1
            self._on_card[replica.place] += len(held)
            replica.leaving = heartbeat.node in self._draining
            if not replica.leaving:
                self._staying.add(heartbeat)
        free = replica.free
        replica.reported, replica.due_at = reported, now + next_s
        replica.one_at_a_time = one_at_a_time
        self._count(replica, heartbeat)
        if unheld or replica.unheld:
            before, replica.unheld = replica.unheld, frozenset(unheld)
            replica.orphans = before & replica.unheld
        busy = bool(running or replica.held)
        if busy:
            there = {(lease.session, lease.image_id) for lease in running}
            coming_s = sum(i.work_s for key, i in replica.held.items() if key not in there)
            replica.done_at = now + heartbeat.running_work_s + coming_s / (heartbeat.speed or 1.0)
        else:
            replica.done_at = min(replica.done_at, now)
        self._update(replica, now)
        return first, replica.free > free

    def refresh(self, usable: Callable[[Heartbeat], tuple[int, bool]], now: float) -> None:
        """Count the free slots of all replicas again, because time has passed.

        `usable`: says of a heartbeat how many slots may be used, and whether the card has had a
        fault.
        """
        for replica in self:
            slots, replica.one_at_a_time = usable(replica.reported)
            if slots != replica.heartbeat.slots:
                self._count(replica, replica.reported._replace(slots=slots))
            self._update(replica, now)

    def _count(self, replica: Replica, heartbeat: Heartbeat) -> None:
        """Let a heartbeat be the one that counts for a replica."""
        if heartbeat != replica.heartbeat:
            if not replica.leaving:
                self._staying.add(replica.heartbeat, -1)
                self._staying.add(heartbeat)
            replica.heartbeat = heartbeat

    def expire(self, now: float, lease_s: float) -> None:
        """Drop the replicas whose heartbeat is overdue for longer than `lease_s`."""
        for name in [n for n, r in self._replicas.items() if now - r.due_at > lease_s]:
            self.drop(name, now)

    def drop(self, name: str, now: float) -> Replica | None:
        """Forget a replica that has died; the images that it held stay with their sessions."""
        if (replica := self._replicas.pop(name, None)) is None:
            return None
        self.free -= replica.free
        if not replica.leaving:
            self._staying.add(replica.heartbeat, -1)
        self._on_card[replica.place] -= len(replica.held)
        self._on_node[replica.heartbeat.node] -= 1
        if not replica.held:
            del self._held[name]
        if self._excess:
            self._choose_leaving(now)
        return replica

    # -- slots ----------------------------------------------------------------------------------

    def choose(self, image: QueuedImage, now: float) -> Replica | None:
        """The replica that should run an image; None if no staying replica has a free slot.

        An image that must run `alone` may be what has killed replicas. It gets a replica whose card
        had no fault if it can, and the emptiest of these.
        """
        if image.alone:
            usable = [replica for replica in self if replica.free > 0]
            return min(
                usable, key=lambda r: (r.one_at_a_time, len(r.held), r.done_at), default=None
            )
        found: list[Replica] = []
        limit = math.inf
        while self._heap and len(found) < CANDIDATES and self._heap[0][0] <= limit:
            key = heappop(self._heap)
            replica = self._replicas.get(key[2])
            if replica and replica.key == key:
                if not found:
                    near_s = NEAR * image.work_s / (replica.heartbeat.speed or 1.0)
                    limit = max(replica.done_at, now) + near_s
                found.append(replica)
        for replica in found:
            if replica.key:
                heappush(self._heap, replica.key)
        if len(found) < 2:
            return found[0] if found else None
        return min(found, key=lambda replica: self._order(replica, image.size))

    def hold(self, name: str, key: ImageKey, image: RunningImage, now: float) -> None:
        """Give an image a slot of a replica, which may be one that has not been heard yet."""
        self._held.setdefault(name, {})[key] = image
        self.running += 1
        if replica := self._replicas.get(name):
            self._on_card[replica.place] += 1
            replica.done_at = max(replica.done_at, now) + image.work_s / (
                replica.heartbeat.speed or 1.0
            )
            replica.sizes.add(image.size)
            self._update(replica, now)

    def release(self, name: str, key: ImageKey, now: float) -> None:
        """Take back an image's slot."""
        held = self._held.get(name, {})
        if held.pop(key, None) is None:
            return
        self.running -= 1
        if replica := self._replicas.get(name):
            self._on_card[replica.place] -= 1
            if not held:
                replica.done_at = min(replica.done_at, now)
            self._update(replica, now)
        elif not held:
            del self._held[name]

    def avoid(self, name: str, until: float, now: float) -> None:
        """Give a replica no new images before the time `until`, because it has refused one."""
        if replica := self._replicas.get(name):
            replica.avoided_until = until
            self._update(replica, now)

    # -- leaving replicas -----------------------------------------------------------------------

    def set_draining(self, nodes: Collection[str], now: float) -> None:
        """Give replicas on these nodes no new images."""
        self._draining = nodes
        self._choose_leaving(now)

    def keep(self, replicas: int, now: float) -> None:
        """Give new images to at most `replicas` of the present replicas; Serve stops the others."""
        if replicas < self._staying.replicas:
            self._excess = _Excess(now, replicas)
            self._choose_leaving(now)

    def keep_all(self, now: float) -> None:
        """Give all replicas new images again, because Ray Serve stops none."""
        if self._excess:
            self._excess = None
            self._choose_leaving(now)

    @property
    def excess_since(self) -> float | None:
        """Since when some replicas are expected to be stopped; None if none are."""
        return self._excess.since if self._excess else None

    def _choose_leaving(self, now: float) -> None:
        """Decide again which replicas are leaving."""
        drained = [r for r in self if r.heartbeat.node in self._draining]
        leaving = set(map(id, drained))
        if self._excess:
            before = [
                r for r in self if id(r) not in leaving and r.first_heard <= self._excess.since
            ]
            before.sort(key=lambda r: (self._on_node[r.heartbeat.node], -r.first_heard))
            leaving |= set(map(id, before[: max(len(before) - self._excess.staying, 0)]))
        for replica in self:
            if replica.leaving != (id(replica) in leaving):
                replica.leaving = not replica.leaving
                self._staying.add(replica.heartbeat, -1 if replica.leaving else 1)
                self._update(replica, now)

    # -- the heap -------------------------------------------------------------------------------

    def _update(self, replica: Replica, now: float) -> None:
        """Count a replica's free slots again, and put it into the heap if its place has changed."""
        usable = not replica.leaving and now >= replica.avoided_until
        taken = len(replica.held) + len(replica.orphans)
        free = max(replica.heartbeat.slots - taken, 0) if usable else 0
        self.free += free - replica.free
        replica.free = free
        if not free:
            replica.key = None
        elif replica.key is None or replica.key[0] != replica.done_at:
            self._keys += 1
            replica.key = replica.done_at, self._keys, replica.heartbeat.replica
            heappush(self._heap, replica.key)
            if len(self._heap) > 2 * len(self._replicas) + SLACK:
                self._heap = [one.key for one in self if one.key]
                heapify(self._heap)

    def _order(self, replica: Replica, size: str) -> tuple[bool, int, bool, float]:
        company = any(image.size == size for image in replica.held.values())
        beside = self._on_card[replica.place]
        return not company, beside, size not in replica.sizes, replica.done_at
