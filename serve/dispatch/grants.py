"""Who may use which free slot: the Dispatcher's state, without clock, network or Ray.

An *entry* is one image waiting; it names the pools it may run in, preferred first. A *slot* is
room for one image in a pool: replicas × slots each, as the replicas report themselves. A *grant*
gives a free slot to the entry that waited longest among those that may use it; binding is late,
so an entry never waits while a pool that it allows has room. A grant is a lease of the *session*
(one Ingress replica) that submitted the entry: a session that falls silent gives all of its
entries and slots back.

Time is an argument, in seconds on any steady clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Pools = tuple[str, ...]


class Outcome(NamedTuple):
    """What became of an entry: the pool it was granted, or that the queue was full."""

    session: str
    entry: str
    pool: str | None
    kind: Literal["granted", "queue_full"]


@dataclass(slots=True)
class _Session:
    last_heard: float
    waiting: dict[str, _Entry] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)  # entry → pool


@dataclass(slots=True)
class _Entry:
    number: int  # order of arrival
    session: str
    id: str
    pools: Pools
    withdrawn: bool = False


@dataclass(slots=True)
class _Replica:
    slots: int
    last_heard: float


class Grants:
    """FIFO among entries; see the module's text for the words."""

    def __init__(self, *, max_queued: int, session_lease_s: float, replica_lease_s: float) -> None:
        self.max_queued = max_queued
        self.session_lease_s = session_lease_s
        self.replica_lease_s = replica_lease_s
        self._sessions: dict[str, _Session] = {}
        self._replicas: dict[str, dict[str, _Replica]] = {}
        self._running: dict[str, int] = {}  # granted slots per pool
        # One line per combination of pools: within it order of arrival is order of service, so
        # only the heads are compared.
        self._lines: dict[Pools, deque[_Entry]] = {}
        self._arrivals = 0
        self._queued = 0

    # -- what the outside tells ---------------------------------------------------------------

    def open(self, session: str, now: float, running: Iterable[tuple[str, str]] = ()) -> None:
        """Begin a session; `running` are the (entry, pool) it already runs by earlier grants."""
        self.close(session)
        self._sessions[session] = _Session(now)
        for entry, pool in running:
            self._sessions[session].running[entry] = pool
            self._running[pool] = self._running.get(pool, 0) + 1

    def close(self, session: str) -> None:
        """End a session: its entries leave the queue and its slots are free."""
        gone = self._sessions.pop(session, None)
        if gone:
            for entry in gone.waiting.values():
                self._withdraw(entry)
            for pool in gone.running.values():
                self._running[pool] -= 1

    def heard_from(self, session: str, now: float) -> bool:
        """Renew a session's lease; False if there is no such session (any more)."""
        if session not in self._sessions:
            return False
        self._sessions[session].last_heard = now
        return True

    def submit(self, session: str, entry: str, pools: Pools) -> Outcome | None:
        """Queue an entry; an `Outcome` is returned only when the queue is full."""
        holder = self._sessions[session]
        if entry in holder.waiting or entry in holder.running:
            return None
        if self._queued >= self.max_queued:
            return Outcome(session, entry, None, "queue_full")
        self._arrivals += 1
        queued = _Entry(self._arrivals, session, entry, pools)
        holder.waiting[entry] = queued
        self._lines.setdefault(pools, deque()).append(queued)
        self._queued += 1
        return None

    def release(self, session: str, entry: str) -> None:
        """The entry is done or no longer wanted, whether it waits, runs, or is unknown."""
        holder = self._sessions[session]
        if waiting := holder.waiting.pop(entry, None):
            self._withdraw(waiting)
        elif pool := holder.running.pop(entry, None):
            self._running[pool] -= 1

    def report_replica(self, pool: str, replica: str, slots: int, now: float) -> None:
        """A replica of a pool is there with so many slots."""
        self._replicas.setdefault(pool, {})[replica] = _Replica(slots, now)

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
            self._lines[entry.pools].popleft()
            if not self._lines[entry.pools]:
                del self._lines[entry.pools]
            self._queued -= 1
            holder = self._sessions[entry.session]
            del holder.waiting[entry.id]
            holder.running[entry.id] = pool
            self._running[pool] = self._running.get(pool, 0) + 1
            granted.append(Outcome(entry.session, entry.id, pool, "granted"))
        return granted

    def free_slots(self, pool: str) -> int:
        slots = sum(replica.slots for replica in self._replicas.get(pool, {}).values())
        return slots - self._running.get(pool, 0)

    def replicas(self) -> dict[str, int]:
        """Living replicas per pool."""
        return {pool: len(replicas) for pool, replicas in self._replicas.items()}

    @property
    def queue_depth(self) -> int:
        return self._queued

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

    def _withdraw(self, entry: _Entry) -> None:
        entry.withdrawn = True
        self._queued -= 1
