"""Who may use which free slot: the Dispatcher's state, without clock, network or Ray.

An *entry* is one image waiting; it names the pools it may run in, preferred first. A *slot* is
room for one image in a pool: replicas × slots each, as the replicas report themselves. A *grant*
gives a free slot to the entry that waited longest among those that may use it; binding is late,
so an entry never waits while a pool that it allows has room. A grant is a lease of the *session*
(one Ingress replica) that submitted the entry: a session that falls silent gives all of its
entries and slots back.

A *request id* belongs to the session whose entries carry it for as long as one of them waits or
runs. A pool is *possible* if a replica of it lives or a node could hold one; an entry that has no
possible pool is refused, and never waits for what cannot come.

Time is an argument, in seconds on any steady clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .messages import Heartbeat, Lease, Outcome, Pools, Running, Submission


@dataclass(slots=True)
class _Session:
    last_heard: float
    waiting: dict[str, _Entry] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry:
    number: int  # order of arrival
    session: str
    asked: Submission
    withdrawn: bool = False
    position: int = 0  # as it was last told


@dataclass(slots=True)
class _Owner:
    session: str
    entries: int = 0


@dataclass(slots=True)
class _Replica:
    said: Heartbeat
    last_heard: float


class Grants:
    """FIFO among entries; see the module's text for the words."""

    def __init__(self, *, max_queued: int, session_lease_s: float, replica_lease_s: float) -> None:
        self.max_queued = max_queued
        self.draining = False  # refuse what is new
        self.session_lease_s = session_lease_s
        self.replica_lease_s = replica_lease_s
        self._sessions: dict[str, _Session] = {}
        self._replicas: dict[str, dict[str, _Replica]] = {}
        self._placeable: frozenset[str] | None = None  # not known yet: any pool may come
        self._running: dict[str, int] = {}  # granted slots per pool
        self._owners: dict[str, _Owner] = {}  # of request ids
        # One line per combination of pools: within it order of arrival is order of service, so
        # only the heads are compared.
        self._lines: dict[Pools, deque[_Entry]] = {}
        self._watched: dict[int, _Entry] = {}  # waiting ones, by number
        self._arrivals = 0
        self._queued = 0

    # -- what the outside tells ---------------------------------------------------------------

    def open(self, session: str, now: float, running: Iterable[Running] = ()) -> None:
        """Begin a session; `running` is what it already runs by earlier grants."""
        self.close(session)
        self._sessions[session] = _Session(now)
        for entry in running:
            self._sessions[session].running[entry.entry] = entry
            self._running[entry.pool] = self._running.get(entry.pool, 0) + 1
            self._claim(session, entry.request_id)

    def close(self, session: str) -> None:
        """End a session: its entries leave the queue and its slots are free."""
        gone = self._sessions.get(session)
        if gone:
            for entry in [*gone.waiting, *gone.running]:
                self.release(session, entry)
            del self._sessions[session]

    def heard_from(self, session: str, now: float) -> bool:
        """Renew a session's lease; False if there is no such session (any more)."""
        if session not in self._sessions:
            return False
        self._sessions[session].last_heard = now
        return True

    def submit(self, session: str, asked: Submission) -> Outcome | None:
        """Queue an entry; an `Outcome` is returned only when it is refused at once."""
        holder = self._sessions[session]
        if asked.entry in holder.waiting or asked.entry in holder.running:
            return None
        if not self._possible(asked.pools):
            return Outcome(session, asked.entry, None, "no_capacity")
        if not asked.accepted:
            owner = self._owners.get(asked.request_id)
            if self.draining:
                return Outcome(session, asked.entry, None, "draining")
            if owner and owner.session != session:
                return Outcome(session, asked.entry, None, "request_id_in_use")
            if self._queued >= self.max_queued:
                return Outcome(session, asked.entry, None, "queue_full")
        self._arrivals += 1
        queued = _Entry(self._arrivals, session, asked)
        holder.waiting[asked.entry] = queued
        self._lines.setdefault(asked.pools, deque()).append(queued)
        self._queued += 1
        if asked.watched:
            self._watched[queued.number] = queued
        self._claim(session, asked.request_id)
        return None

    def release(self, session: str, entry: str) -> None:
        """The entry is done or no longer wanted, whether it waits, runs, or is unknown."""
        holder = self._sessions[session]
        if waiting := holder.waiting.pop(entry, None):
            waiting.withdrawn = True
            self._leave_queue(waiting)
            self._disclaim(waiting.asked.request_id)
        elif running := holder.running.pop(entry, None):
            self._running[running.pool] -= 1
            self._disclaim(running.request_id)

    def report_replica(self, said: Heartbeat, now: float) -> None:
        """A replica of a pool is there."""
        self._replicas.setdefault(said.pool, {})[said.replica] = _Replica(said, now)

    def owner(self, request_id: str) -> str | None:
        """The session whose entries carry a request id."""
        owner = self._owners.get(request_id)
        return owner.session if owner else None

    def holds(self, lease: Lease) -> bool:
        """Whether the lease's session still runs its entry."""
        session = self._sessions.get(lease.session)
        return session is not None and lease.entry in session.running

    def set_placeable(self, pools: Iterable[str]) -> None:
        """The pools of which some node of the cluster could hold a replica."""
        self._placeable = frozenset(pools)

    def expire(self, now: float) -> list[str]:
        """Drop sessions and replicas that have fallen silent; returns the sessions."""
        for replicas in self._replicas.values():
            for name, replica in list(replicas.items()):
                if now - replica.last_heard > self.replica_lease_s:
                    del replicas[name]
        silent = [
            name
            for name, session in self._sessions.items()
            if now - session.last_heard > self.session_lease_s
        ]
        for name in silent:
            self.close(name)
        return silent

    # -- what follows -------------------------------------------------------------------------

    def grant(self) -> list[Outcome]:
        """Give every free slot to the entry that waited longest among those that may use it."""
        granted = []
        while choice := self._next():
            entry, pool = choice
            asked = entry.asked
            self._lines[asked.pools].popleft()
            if not self._lines[asked.pools]:
                del self._lines[asked.pools]
            self._leave_queue(entry)
            holder = self._sessions[entry.session]
            del holder.waiting[asked.entry]
            holder.running[asked.entry] = Running(asked.entry, pool, asked.request_id)
            self._running[pool] = self._running.get(pool, 0) + 1
            granted.append(Outcome(entry.session, asked.entry, pool, "granted"))
        return granted

    def refuse(self) -> list[Outcome]:
        """Take the entries out of the queue whose pools have all become impossible."""
        hopeless = [
            entry
            for pools, line in self._lines.items()
            if not self._possible(pools)
            for entry in line
            if not entry.withdrawn
        ]
        for entry in hopeless:
            self.release(entry.session, entry.asked.entry)
        return [Outcome(e.session, e.asked.entry, None, "no_capacity") for e in hopeless]

    def positions(self) -> list[Outcome]:
        """Where the watched entries wait, if it has changed since it was last told.

        Counted are those that came before and may run in one of the same pools.
        """
        moved: list[Outcome] = []
        lines = {
            pools: [entry.number for entry in line if not entry.withdrawn]
            for pools, line in (self._lines.items() if self._watched else ())
        }
        for number, entry in self._watched.items():
            wanted = set(entry.asked.pools)
            position = 1 + sum(
                bisect_left(numbers, number)
                for pools, numbers in lines.items()
                if not wanted.isdisjoint(pools)
            )
            if position != entry.position:
                entry.position = position
                moved.append(Outcome(entry.session, entry.asked.entry, None, "queued", position))
        return moved

    def free_slots(self, pool: str) -> int:
        return sum(said.slots for said in self.replicas(pool)) - self.running_in(pool)

    def replicas(self, pool: str) -> list[Heartbeat]:
        """What the living replicas of a pool last said."""
        return [replica.said for replica in self._replicas.get(pool, {}).values()]

    def placeable(self, pool: str) -> bool:
        """Whether a node could hold a replica of the pool, as far as is known."""
        return self._placeable is None or pool in self._placeable

    @property
    def queue_depth(self) -> int:
        return self._queued

    def running_in(self, pool: str) -> int:
        """Granted slots of a pool."""
        return self._running.get(pool, 0)

    def _possible(self, pools: Pools) -> bool:
        return any(self.replicas(pool) or self.placeable(pool) for pool in pools)

    def _leave_queue(self, entry: _Entry) -> None:
        self._queued -= 1
        self._watched.pop(entry.number, None)

    def _claim(self, session: str, request_id: str) -> None:
        if request_id:
            self._owners.setdefault(request_id, _Owner(session)).entries += 1

    def _disclaim(self, request_id: str) -> None:
        if owner := self._owners.get(request_id):
            owner.entries -= 1
            if not owner.entries:
                del self._owners[request_id]

    def _next(self) -> tuple[_Entry, str] | None:
        best: tuple[_Entry, str] | None = None
        for pools, line in list(self._lines.items()):
            while line and line[0].withdrawn:
                line.popleft()
            if not line:
                del self._lines[pools]
                continue
            if best and best[0].number < line[0].number:
                continue
            free = next((pool for pool in pools if self.free_slots(pool) > 0), None)
            if free:
                best = line[0], free
        return best
