"""Who may use which free slot: the Dispatcher's state, without clock, network or Ray.

An *entry* is one image waiting; it names the pools it may run in, preferred first. A *slot* is
room for one image in a pool: replicas × slots each, as the replicas report themselves. A *grant*
gives a free slot to the entry that is next by fairness (`fair_queue`) among those that may use it;
binding is late, so an entry never waits while a pool that it allows has room. A grant is a lease of
the *session* (one Ingress replica) that submitted the entry: a session that falls silent gives all
of its entries and slots back.

A pool is *possible* if a replica of it lives or a node could hold one; an entry that has no
possible pool is refused, and never waits for what cannot come.

Time is an argument, in seconds on any steady clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from ..usage.record import UsageRecord
from .fair_queue import FairQueue, Item
from .protocol import (
    Heartbeat,
    Lease,
    Outcome,
    Pools,
    QueuedImage,
    Release,
    RunningImage,
    StoppedImage,
)

UNSETTLED_S = 30.0  # a Generator has said by then what it took of an entry, or it never will
EXCESS_S = 600.0  # a replica that is still there then was not stopped
TOLD_POSITIONS = 1000  # who waits further back hears its position when it has come nearer


@dataclass(slots=True)
class _Waiting:
    session: str
    asked: QueuedImage
    since: float
    position: int = 0  # as it was last told


@dataclass(slots=True)
class _Session:
    last_heard: float
    waiting: dict[str, Item] = field(default_factory=dict)
    running: dict[str, RunningImage] = field(default_factory=dict)


class _Unsettled(NamedTuple):
    """A slot that was given back before its Generator has said what it took."""

    since: float
    taken: RunningImage
    cancelled: UsageRecord | None


@dataclass(slots=True)
class _Replica:
    said: Heartbeat
    first_heard: float
    last_heard: float
    drawing: frozenset[Lease]


class _Excess(NamedTuple):
    """Of the replicas that were there at a time, so many stay; Ray Serve stops the others."""

    since: float
    staying: int


class Grants:
    """See the module's text for the words."""

    def __init__(
        self, pools: Sequence[str], *, session_lease_s: float, replica_lease_s: float
    ) -> None:
        """`pools`: those of a model in the order in which they are preferred."""
        self.queue = FairQueue()
        self.session_lease_s = session_lease_s
        self.replica_lease_s = replica_lease_s
        self._sessions: dict[str, _Session] = {}
        self._replicas: dict[str, dict[str, _Replica]] = {pool: {} for pool in pools}
        self._placeable: frozenset[str] | None = None  # not known yet: any pool may come
        self._excess: dict[str, _Excess] = {}
        self.draining: frozenset[str] = frozenset()  # nodes that are about to go
        self._running: dict[str, int] = {}  # granted slots per pool
        self._watched: dict[int, Item] = {}  # waiting ones, by number
        self._unsettled: dict[Lease, _Unsettled] = {}
        self._stopped: dict[Lease, tuple[float, StoppedImage]] = {}  # before their release

    # -- what the outside tells ---------------------------------------------------------------

    def open(self, session: str, now: float) -> None:
        """Begin a session."""
        self.close(session)
        self._sessions[session] = _Session(now)

    def close(self, session: str) -> None:
        """End a session: its entries leave the queue and its slots are free."""
        if gone := self._sessions.pop(session, None):
            for item in gone.waiting.values():
                self._leave_queue(item)
            for taken in gone.running.values():
                self._free(taken)
                self._settle(taken, taken.work_s)

    def heard_from(self, session: str, now: float) -> bool:
        """Renew a session's lease; False if there is no such session (any more)."""
        if session not in self._sessions:
            return False
        self._sessions[session].last_heard = now
        return True

    def declare(self, session: str, running: RunningImage) -> None:
        """What a session already runs by an earlier grant."""
        self._hold(session, running)
        self.queue.taken_before(running.tenant, running.pool, running.work_s)

    def submit(self, session: str, asked: QueuedImage, tenant: str, now: float) -> Outcome | None:
        """Queue an entry; an `Outcome` is returned only when it is refused at once."""
        holder = self._sessions[session]
        if asked.entry in holder.waiting or asked.entry in holder.running:
            return None
        if not self.possible(asked.pools):
            return Outcome(session, asked.entry, None, "no_capacity")
        item = Item(tenant, asked.work_s, asked.pools, _Waiting(session, asked, now))
        self.queue.add(item)
        holder.waiting[asked.entry] = item
        if asked.watched:
            self._watched[item.number] = item
        return None

    def release(
        self, session: str, release: Release, now: float
    ) -> StoppedImage | Literal["awaited"] | None:
        """An entry is done or no longer wanted, whether it waits, runs, or is unknown.

        Of one that was stopped, returns what its Generator has said of it. If that is awaited,
        `stopped` or `give_up` return what was to be charged for it.
        """
        holder = self._sessions[session]
        if item := holder.waiting.pop(release.entry, None):
            self._leave_queue(item)
        elif taken := holder.running.pop(release.entry, None):
            self._free(taken)
            if release.took_s is not None:
                self._settle(taken, release.took_s)
                return None
            lease = Lease(session, release.entry, taken.pool)
            if lease in self._stopped:
                _, stopped = self._stopped.pop(lease)
                self._settle(taken, stopped.work_s)
                return stopped
            self._unsettled[lease] = _Unsettled(now, taken, release.cancelled)
            return "awaited"
        return None

    def stopped(self, stopped: StoppedImage, now: float) -> UsageRecord | None:
        """A Generator says what it took of an entry; returns what was to be charged for it."""
        unsettled = self._unsettled.pop(stopped.lease, None)
        if unsettled is None:
            if self.holds(stopped.lease):
                self._stopped[stopped.lease] = now, stopped
            return None
        self._settle(unsettled.taken, stopped.work_s)
        return unsettled.cancelled

    def report_replica(self, said: Heartbeat, now: float, drawing: Iterable[Lease] = ()) -> None:
        """A replica of a pool is there. One of a pool that is no more is not heard."""
        if (replicas := self._replicas.get(said.pool)) is not None:
            known = replicas.get(said.replica)
            first_heard = known.first_heard if known else now
            replicas[said.replica] = _Replica(said, first_heard, now, frozenset(drawing))

    def keep(self, pool: str, replicas: int, now: float) -> None:
        """No more than so many of those that are there stay: the others get nothing new."""
        if replicas < len(self._staying(pool)):
            self._excess[pool] = _Excess(now, replicas)

    def holds(self, lease: Lease) -> bool:
        """Whether the lease's session still runs its entry."""
        session = self._sessions.get(lease.session)
        return session is not None and lease.entry in session.running

    def set_placeable(self, pools: Iterable[str]) -> None:
        """The pools of which a replica could be placed, now or on a node that is added."""
        self._placeable = frozenset(pools)

    def expire(self, now: float) -> list[str]:
        """Drop sessions and replicas that have fallen silent; returns the sessions."""
        for replicas in self._replicas.values():
            for name, replica in list(replicas.items()):
                if now - replica.last_heard > self.replica_lease_s:
                    del replicas[name]
        for pool, excess in list(self._excess.items()):
            if now - excess.since > EXCESS_S:
                del self._excess[pool]
        for lease, (since, _) in list(self._stopped.items()):
            if now - since > UNSETTLED_S:
                del self._stopped[lease]
        silent = [
            name
            for name, session in self._sessions.items()
            if now - session.last_heard > self.session_lease_s
        ]
        for name in silent:
            self.close(name)
        return silent

    def give_up(self, now: float) -> list[UsageRecord]:
        """What was to be charged for entries of which no Generator has said what they took."""
        late = [x for x, entry in self._unsettled.items() if now - entry.since > UNSETTLED_S]
        gone = [self._unsettled.pop(lease) for lease in late]
        for entry in gone:
            self._settle(entry.taken, entry.taken.work_s)
        return [entry.cancelled for entry in gone if entry.cancelled]

    # -- what follows -------------------------------------------------------------------------

    def grant(self) -> list[Outcome]:
        """Give every free slot to the entry that is next among those that may use it."""
        granted = []
        for pool in self._replicas:
            while self.free_slots(pool) > 0 and (item := self.queue.first(pool)):
                entry: _Waiting = item.what
                # Pools come in order of preference, but a further attempt may prefer another one.
                best = next(p for p in item.pools if p == pool or self._next_in(p) is item)
                self.queue.take(item, best)
                self._watched.pop(item.number, None)
                asked = entry.asked
                del self._sessions[entry.session].waiting[asked.entry]
                running = RunningImage(asked.entry, asked.call, item.tenant, best, asked.work_s)
                self._hold(entry.session, running)
                granted.append(Outcome(entry.session, asked.entry, best, "granted"))
        return granted

    def refuse(self) -> list[Outcome]:
        """Take the entries out of the queue whose pools have all become impossible."""
        hopeless = [item.what for item in self.queue if not self.possible(item.pools)]
        for entry in hopeless:
            self.release(entry.session, Release(entry.asked.entry), 0.0)
        return [Outcome(e.session, e.asked.entry, None, "no_capacity") for e in hopeless]

    def positions(self) -> list[Outcome]:
        """Where the watched entries wait, if it has changed since it was last told.

        In the pool in which they come first, if nobody else came.
        """
        found: dict[int, int] = {}
        for pool in {pool for item in self._watched.values() for pool in item.pools}:
            for place, item in enumerate(islice(self.queue.order(pool), TOLD_POSITIONS), 1):
                if item.number in self._watched:
                    found[item.number] = min(place, found.get(item.number, place))
        moved: list[Outcome] = []
        for number, place in found.items():
            entry: _Waiting = self._watched[number].what
            if place != entry.position:
                entry.position = place
                moved.append(Outcome(entry.session, entry.asked.entry, None, "queued", place))
        return moved

    def free_slots(self, pool: str) -> int:
        """Of the replicas that stay; what others draw takes none of them."""
        staying = self._staying(pool)
        free = sum(replica.said.slots for replica in staying) - self.running_in(pool)
        if len(staying) < len(self._replicas.get(pool, {})):
            names = {replica.said.replica for replica in staying}
            for name, replica in self._replicas[pool].items():
                if name not in names:
                    free += sum(map(self.holds, replica.drawing))
        return free

    def slots(self, pool: str) -> int:
        """Of the replicas that stay."""
        return sum(said.slots for said in self.staying(pool))

    def replicas(self, pool: str) -> list[Heartbeat]:
        """What the living replicas of a pool last said."""
        return [replica.said for replica in self._replicas.get(pool, {}).values()]

    def staying(self, pool: str) -> list[Heartbeat]:
        """What those last said that are neither in excess nor on a node that is drained."""
        return [replica.said for replica in self._staying(pool)]

    def _staying(self, pool: str) -> list[_Replica]:
        there = [
            replica
            for replica in self._replicas.get(pool, {}).values()
            if replica.said.node not in self.draining
        ]
        if not (excess := self._excess.get(pool)):
            return there
        before = [replica for replica in there if replica.first_heard <= excess.since]
        if len(before) <= excess.staying:
            return there
        # Which of them Serve stops is not known: those that draw most can take least anyway.
        before.sort(key=lambda replica: len(replica.drawing))
        return before[: excess.staying] + [r for r in there if r.first_heard > excess.since]

    def placeable(self, pool: str) -> bool:
        """Whether a node could hold a replica of the pool, as far as is known."""
        return self._placeable is None or pool in self._placeable

    def possible(self, pools: Pools) -> bool:
        return any(self.replicas(pool) or self.placeable(pool) for pool in pools)

    @property
    def queue_depth(self) -> int:
        return len(self.queue)

    def running_in(self, pool: str) -> int:
        """Granted slots of a pool."""
        return self._running.get(pool, 0)

    def _next_in(self, pool: str) -> Item | None:
        """Who gets the pool's next slot, if one is free."""
        return self.queue.first(pool) if self.free_slots(pool) > 0 else None

    def running_by_tenant(self) -> Counter[str]:
        """Granted slots."""
        sessions = self._sessions.values()
        return Counter(taken.tenant for held in sessions for taken in held.running.values())

    def _hold(self, session: str, taken: RunningImage) -> None:
        self._sessions[session].running[taken.entry] = taken
        self._running[taken.pool] = self._running.get(taken.pool, 0) + 1

    def _free(self, taken: RunningImage) -> None:
        self._running[taken.pool] -= 1

    def _leave_queue(self, item: Item) -> None:
        self.queue.remove(item)
        self._watched.pop(item.number, None)

    def _settle(self, taken: RunningImage, took_s: float) -> None:
        self.queue.settle(taken.tenant, taken.pool, took_s - taken.work_s)
