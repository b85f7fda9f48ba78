"""Grants of free slots to waiting images: the Dispatcher's state, without clock, network or Ray.

A *slot* is room for one image in a pool. Each replica reports how many slots it has; a pool has the
sum. A *grant* gives a free slot to one waiting image: `fair_queue` chooses it among the images that
may use the pool. An image is bound to a pool only by its grant, so no image waits while one of its
pools has a free slot. A grant is a lease that is held by the *session* (one Ingress replica) which
queued the image. A session that falls silent loses all of its images and slots.

A pool is *possible* if it has a living replica, or if a node could hold one. An image without a
possible pool is refused at once, because it would wait in vain.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from ..usage.record import UsageRecord
from .fair_queue import FairQueue
from .protocol import (
    BATCH,
    Granted,
    Heartbeat,
    Lease,
    Pools,
    Position,
    QueuedImage,
    Refused,
    Release,
    RunningImage,
    StoppedImage,
    tenant_of,
)

UNSETTLED_S = 30.0  # a Generator that has not reported a stopped image by then never will
COUNTED_S = 600.0  # a session that comes back later than that may count its images again
UNKNOWN_S = 10.0  # for this time, a pool that is not in the settings may still be on its way
EXCESS_S = 600.0  # Ray Serve stops no replica in excess later than that
AFTER_REQUESTS_S = 1e9  # by which images of jobs count as later than those of requests
REPORTED_POSITIONS = 1000  # images further back hear their position when they have come nearer


@dataclass(slots=True, eq=False)
class WaitingImage:
    """An image in the fair queue. Within a tenant, images of requests come before those of jobs.

    `tenant`: the name under which it queues, see `flow_of`. `arrived`: the time at which it
    arrived; a further attempt at an image keeps the time of the first. `number`: set by the queue.
    `position`: its place in the queue as last reported; 0 before the first report.
    """

    image: QueuedImage
    tenant: str
    session: str
    arrived: float
    number: int = 0
    position: int = 0
    of_job: bool = False

    @property
    def since(self) -> float:
        """The time that decides on its place among its tenant's images."""
        return self.arrived + AFTER_REQUESTS_S if self.of_job else self.arrived

    @property
    def work_s(self) -> float:
        return self.image.work_s

    @property
    def pools(self) -> Pools:
        return self.image.pools


@dataclass(slots=True)
class _Session:
    last_heard: float
    waiting: dict[str, WaitingImage] = field(default_factory=dict)
    running: dict[str, RunningImage] = field(default_factory=dict)


class _Unsettled(NamedTuple):
    """An image whose slot was given back before its Generator reported the work that it took.

    `cancelled`: the charge of the whole image if its client cancelled it; otherwise None.
    """

    since: float
    image: RunningImage
    cancelled: UsageRecord | None


class DeadReplica(NamedTuple):
    """A replica that has died: its last heartbeat, and the calls whose images died with it."""

    heartbeat: Heartbeat
    calls: frozenset[str]


@dataclass(slots=True)
class _Replica:
    heartbeat: Heartbeat
    first_heard: float
    last_heard: float
    running: frozenset[Lease]


class _Excess(NamedTuple):
    """A decision to have fewer replicas, which Ray Serve carries out later.

    Only `staying` of the replicas that lived at the time `since` stay.
    """

    since: float
    staying: int


class Grants:
    """The queue, the slots and the leases of all sessions."""

    def __init__(self, *, session_lease_s: float, replica_lease_s: float) -> None:
        """`session_lease_s`, `replica_lease_s`: how long a session or a replica may be silent."""
        self.queue: FairQueue[WaitingImage] = FairQueue()
        self.session_lease_s = session_lease_s
        self.replica_lease_s = replica_lease_s
        self.draining: frozenset[str] = frozenset()  # ids of nodes that are about to go
        self.kept_from_batches = 0  # free slots of each pool that batches leave to others
        self._sessions: dict[str, _Session] = {}
        self._replicas: dict[str, dict[str, _Replica]] = {}  # of each pool
        self._removed: frozenset[str] = frozenset()  # pools that are no longer there
        self._unknown: dict[str, float] = {}  # pools that nobody has named yet, and since when
        self._placeable: frozenset[str] | None = None  # None: not known yet, any pool may come
        self._excess: dict[str, _Excess] = {}
        self._running: dict[str, int] = {}  # granted slots by pool
        self._jobs: dict[str, tuple[int, float]] = {}  # waiting images of jobs and their work
        self._dead: list[DeadReplica] = []  # not yet returned by `dead`
        self._watched: dict[int, WaitingImage] = {}  # those that report their position, by number
        self._unsettled: dict[Lease, _Unsettled] = {}
        self._stopped: dict[Lease, tuple[float, StoppedImage]] = {}  # reported before their release
        # Images that ran when their session was closed: their tenants' clocks hold their work.
        self._counted: dict[tuple[str, str], float] = {}  # since when, by session and image id

    # -- sessions -------------------------------------------------------------------------------

    def open(self, session: str, now: float) -> None:
        """Begin a session; an earlier session with the same name is closed first."""
        self.close(session, now)
        self._sessions[session] = _Session(now)

    def close(self, session: str, now: float) -> None:
        """End a session: its images leave the queue, and its slots become free."""
        if ended := self._sessions.pop(session, None):
            for waiting in ended.waiting.values():
                self._leave_queue(waiting)
            for running in ended.running.values():
                self._free(running)
                self._settle(running, running.work_s)
                self._counted[session, running.image_id] = now

    def heard_from(self, session: str, now: float) -> bool:
        """Renew a session's lease. Returns False if the session is not open."""
        if session not in self._sessions:
            return False
        self._sessions[session].last_heard = now
        return True

    def declare(self, session: str, running: RunningImage) -> None:
        """Count an image that runs already, because its slot was granted before the session began.

        Its work counts once, however often the session is opened again.
        """
        self._hold(session, running)
        counted = self._counted.pop((session, running.image_id), None) is not None
        self.queue.taken_before(running.flow, running.pool, 0 if counted else running.work_s)

    def submit(
        self,
        session: str,
        image: QueuedImage,
        flow: str,
        now: float,
        *,
        of_job: bool = False,
    ) -> Refused | None:
        """Queue an image under the name `flow`; returns a refusal if no pool of it is possible.

        `of_job`: whether it waits behind the images of the tenant's requests.
        """
        holder = self._sessions[session]
        if image.id in holder.waiting or image.id in holder.running:
            return None
        if not self.possible(image.pools):
            return Refused(session, image.id)
        for pool in image.pools:
            if pool not in self._replicas and pool not in self._removed:
                self._unknown.setdefault(pool, now)
        waiting = WaitingImage(image, flow, session, now - image.waited_s, of_job=of_job)
        self.queue.add(waiting)
        if of_job:
            self._count_job(waiting, 1)
        holder.waiting[image.id] = waiting
        if image.report_position:
            self._watched[waiting.number] = waiting
        return None

    def release(
        self, session: str, release: Release, now: float
    ) -> StoppedImage | Literal["awaited"] | None:
        """Take a waiting image out of the queue, or free the slot of a running one.

        Does nothing for an unknown image. If `release.took_s` is None, returns the report of the
        Generator that stopped the image, or "awaited" if that report is still to come. An awaited
        image is settled later by `stopped`, or by `give_up` if no report comes.
        """
        holder = self._sessions[session]
        if waiting := holder.waiting.pop(release.image_id, None):
            self._leave_queue(waiting)
        elif running := holder.running.pop(release.image_id, None):
            self._free(running)
            if release.lost:
                self._note_death(Lease(session, running.image_id, running.pool), running.call_id)
            if release.took_s is not None:
                self._settle(running, release.took_s)
                return None
            lease = Lease(session, release.image_id, running.pool)
            if lease in self._stopped:
                _, report = self._stopped.pop(lease)
                self._settle(running, report.work_s)
                return report
            self._unsettled[lease] = _Unsettled(now, running, release.cancelled)
            return "awaited"
        return None

    def dead(self) -> list[DeadReplica]:
        """The replicas that have died while they ran images, since the last call."""
        dead, self._dead = self._dead, []
        return dead

    def expire_replicas(self, now: float) -> None:
        """Drop the replicas that have fallen silent."""
        for replicas in self._replicas.values():
            for name, replica in list(replicas.items()):
                if now - replica.last_heard > self.replica_lease_s:
                    del replicas[name]

    def runs_on(self, lease: Lease) -> Heartbeat | None:
        """The last heartbeat of the replica that runs an image; None if none has reported it."""
        replicas = self._replicas.get(lease.pool, {}).values()
        return next((r.heartbeat for r in replicas if lease in r.running), None)

    def expire(self, now: float) -> list[str]:
        """Drop sessions that have fallen silent; returns their names."""
        late = {pool for pool, since in self._unknown.items() if now - since > UNKNOWN_S}
        self._removed |= late
        self._unknown = {p: at for p, at in self._unknown.items() if p not in late}
        for pool, excess in list(self._excess.items()):
            if pool in self._removed or now - excess.since > EXCESS_S:
                del self._excess[pool]
        for lease, (since, _) in list(self._stopped.items()):
            if now - since > UNSETTLED_S:
                del self._stopped[lease]
        for image, since in list(self._counted.items()):
            if now - since > COUNTED_S:
                del self._counted[image]
        silent = [
            name
            for name, session in self._sessions.items()
            if now - session.last_heard > self.session_lease_s
        ]
        for name in silent:
            self.close(name, now)
        return silent

    # -- Generators -----------------------------------------------------------------------------

    def report_replica(
        self, heartbeat: Heartbeat, now: float, running: Iterable[Lease] = ()
    ) -> bool:
        """Note a replica's heartbeat, unless its pool no longer exists.

        Returns whether it is the replica's first one.
        """
        if (replicas := self._replicas.get(heartbeat.pool)) is None:
            return False
        known = replicas.get(heartbeat.replica)
        first_heard = known.first_heard if known else now
        replicas[heartbeat.replica] = _Replica(heartbeat, first_heard, now, frozenset(running))
        return known is None

    def stopped(self, report: StoppedImage, now: float) -> UsageRecord | None:
        """Note a Generator's report of a stopped image.

        Returns the image's usage record with its full charge, if its client had cancelled it and
        its slot was given back before this report.
        """
        unsettled = self._unsettled.pop(report.lease, None)
        if unsettled is None:
            if self.holds(report.lease):
                self._stopped[report.lease] = now, report
            return None
        self._settle(unsettled.image, report.work_s)
        return unsettled.cancelled

    def give_up(self, now: float) -> list[UsageRecord]:
        """Settle stopped images that no Generator has reported for `UNSETTLED_S`.

        Each counts with its predicted work. Returns the usage records of those images that their
        clients had cancelled.
        """
        late = [x for x, image in self._unsettled.items() if now - image.since > UNSETTLED_S]
        lost = [self._unsettled.pop(lease) for lease in late]
        for unsettled in lost:
            self._settle(unsettled.image, unsettled.image.work_s)
        return [unsettled.cancelled for unsettled in lost if unsettled.cancelled]

    def keep(self, pool: str, replicas: int, now: float) -> None:
        """Let at most `replicas` of the pool's current replicas get new grants.

        Ray Serve will stop the others.
        """
        if replicas < len(self._staying(pool)):
            self._excess[pool] = _Excess(now, replicas)

    def in_excess(self) -> list[str]:
        """The pools of which some replicas get no new grants."""
        return list(self._excess)

    def keep_all(self, pool: str) -> None:
        """Let all replicas of the pool get new grants again, because Ray Serve stops none."""
        self._excess.pop(pool, None)

    def running_image(self, session: str, image_id: str) -> RunningImage | None:
        """The running image of this id; None if the session holds no slot for it."""
        holder = self._sessions.get(session)
        return holder.running.get(image_id) if holder else None

    def holds(self, lease: Lease) -> bool:
        """Return whether the lease's session is open and still holds a slot for the image."""
        session = self._sessions.get(lease.session)
        return session is not None and lease.image_id in session.running

    def waiting_jobs(self, tenant: str) -> tuple[int, float]:
        """The number of a tenant's waiting images of jobs, and their work in seconds."""
        return self._jobs.get(tenant, (0, 0.0))

    def waiting_requests(self, tenant: str) -> tuple[int, float]:
        """The number of a tenant's waiting images of requests, and their work in seconds."""
        images, work_s = self.queue.waiting(tenant)
        of_jobs, jobs_work_s = self.waiting_jobs(tenant)
        return images - of_jobs, max(work_s - jobs_work_s, 0.0)

    # -- decisions ------------------------------------------------------------------------------

    def grant(self) -> list[Granted]:
        """Give every free slot to the image that is next in the fair queue of its pool."""
        granted = []
        for pool in self._replicas:
            while waiting := self._next_in(pool):
                # Pools come in order of preference, but a further attempt may prefer another one.
                best = next(p for p in waiting.pools if p == pool or self._next_in(p) is waiting)
                self.queue.take(waiting, best)
                if waiting.of_job:
                    self._count_job(waiting, -1)
                self._watched.pop(waiting.number, None)
                image = waiting.image
                del self._sessions[waiting.session].waiting[image.id]
                running = RunningImage(image.id, image.call_id, waiting.tenant, best, image.work_s)
                self._hold(waiting.session, running)
                granted.append(Granted(waiting.session, image.id, best))
        return granted

    def refuse(self) -> list[Refused]:
        """Take images that have no possible pool any more out of the queue; returns refusals."""
        hopeless = [waiting for waiting in self.queue if not self.possible(waiting.pools)]
        for waiting in hopeless:
            self.release(waiting.session, Release(waiting.image.id), 0.0)
        return [Refused(waiting.session, waiting.image.id) for waiting in hopeless]

    def evict(self, images: int, *, newcomer: str) -> list[tuple[str, Refused]]:
        """Take at least `images` waiting images out of the queue, to make room for a newcomer.

        They are the newest of the tenants with the most waiting work ÷ weight, apart from the
        tenant `newcomer`. A tenant's batches count as a tenant of their own. All waiting images of
        a call go together, because a call fails as a whole. Returns each image's tenant and its
        refusal.
        """
        evicted: list[tuple[str, Refused]] = []
        while len(evicted) < images and (tenant := self.queue.largest_backlog(but=newcomer)):
            newest = self.queue.newest(tenant)
            session, call_id = newest.session, newest.image.call_id
            waiting = self._sessions[session].waiting
            for image_id in [i for i, w in waiting.items() if w.image.call_id == call_id]:
                self._leave_queue(waiting.pop(image_id))
                evicted.append((tenant_of(tenant), Refused(session, image_id, "evicted")))
        return evicted

    def images_of(self, session: str, call_id: str) -> tuple[int, int, int | None]:
        """The number of a call's waiting and running images, and the place of its first one.

        The place is None if no image waits, or if `REPORTED_POSITIONS` images are before it.
        """
        holder = self._sessions[session]
        waiting = [w for w in holder.waiting.values() if w.image.call_id == call_id]
        running = sum(image.call_id == call_id for image in holder.running.values())
        places = []
        for pool in {pool for image in waiting for pool in image.pools}:
            for place, item in enumerate(islice(self.queue.order(pool), REPORTED_POSITIONS), 1):
                if item.session == session and item.image.call_id == call_id:
                    places.append(place)
                    break
        return len(waiting), running, min(places, default=None)

    def positions(self) -> list[Position]:
        """Return the changed queue positions of the images that want to report theirs.

        Changed means since the last call of this method. An image that waits for several pools has
        a place in each; the lowest of these counts.
        """
        found: dict[int, int] = {}
        for pool in {pool for waiting in self._watched.values() for pool in waiting.pools}:
            in_order = islice(self.queue.order(pool), REPORTED_POSITIONS)
            for place, waiting in enumerate(in_order, 1):
                if waiting.number in self._watched:
                    found[waiting.number] = min(place, found.get(waiting.number, place))
        moved: list[Position] = []
        for number, place in found.items():
            waiting = self._watched[number]
            if place != waiting.position:
                waiting.position = place
                moved.append(Position(waiting.session, waiting.image.id, place))
        return moved

    # -- pools ----------------------------------------------------------------------------------

    def set_pools(self, pools: Iterable[str]) -> None:
        """Set the pools that there are now: each model's pools in order of preference.

        A new pool counts as placeable until `set_placeable` says more.
        """
        before, self._replicas = self._replicas, {}
        for pool in pools:
            self._replicas[pool] = before.get(pool, {})
        self._removed = (self._removed | before.keys()) - self._replicas.keys()
        self._unknown = {p: at for p, at in self._unknown.items() if p not in self._replicas}
        if self._placeable is not None:
            self._placeable |= self._replicas.keys() - before.keys()

    @property
    def pools(self) -> list[str]:
        """The names of the pools that there are now."""
        return list(self._replicas)

    def set_placeable(self, pools: Iterable[str]) -> None:
        """Set the pools of which a replica fits on a node that exists or may still be added."""
        self._placeable = frozenset(pools)

    def placeable(self, pool: str) -> bool:
        """Return whether a node could hold a replica of the pool; True until the nodes are read."""
        return self._placeable is None or pool in self._placeable

    def possible(self, pools: Pools) -> bool:
        """Return whether any of the pools has a living replica, or could have one on a node.

        A pool that nobody has named yet may be new: its Ingress has heard of it earlier. After
        `UNKNOWN_S` it counts as removed.
        """
        return any(
            self.placeable(pool) or self.replicas(pool)
            if pool in self._replicas
            else pool not in self._removed
            for pool in pools
        )

    def free_slots(self, pool: str) -> int:
        """The number of free slots on the staying replicas.

        An image that runs on a leaving replica takes no slot of a staying one.
        """
        staying = self._staying(pool)
        free = sum(replica.heartbeat.slots for replica in staying) - self.running_in(pool)
        if len(staying) < len(self._replicas.get(pool, {})):
            names = {replica.heartbeat.replica for replica in staying}
            for name, replica in self._replicas[pool].items():
                if name not in names:
                    free += sum(map(self.holds, replica.running))
        return free

    def slots(self, pool: str) -> int:
        """The number of all slots on the staying replicas, free or not."""
        return sum(heartbeat.slots for heartbeat in self.staying(pool))

    def replicas(self, pool: str) -> list[Heartbeat]:
        """The last heartbeat of each living replica."""
        return [replica.heartbeat for replica in self._replicas.get(pool, {}).values()]

    def staying(self, pool: str) -> list[Heartbeat]:
        """The last heartbeats of the staying replicas, which may get new grants.

        A replica is leaving if Ray Serve is about to stop it, or if its node is being drained.
        """
        return [replica.heartbeat for replica in self._staying(pool)]

    @property
    def queue_depth(self) -> int:
        """The number of waiting images."""
        return len(self.queue)

    def running_in(self, pool: str) -> int:
        """The number of granted slots of a pool."""
        return self._running.get(pool, 0)

    def running_by_tenant(self) -> Counter[str]:
        """The number of granted slots of each tenant."""
        sessions = self._sessions.values()
        return Counter(
            tenant_of(image.flow) for held in sessions for image in held.running.values()
        )

    def _staying(self, pool: str) -> list[_Replica]:
        alive = [
            replica
            for replica in self._replicas.get(pool, {}).values()
            if replica.heartbeat.node not in self.draining
        ]
        if not (excess := self._excess.get(pool)):
            return alive
        before = [replica for replica in alive if replica.first_heard <= excess.since]
        if len(before) <= excess.staying:
            return alive
        # Nobody knows which replicas Serve will stop. So assume the busiest, which have least room.
        before.sort(key=lambda replica: len(replica.running))
        return before[: excess.staying] + [r for r in alive if r.first_heard > excess.since]

    def _next_in(self, pool: str) -> WaitingImage | None:
        """The image that the pool's next free slot belongs to; None without a free slot."""
        if (free := self.free_slots(pool)) <= 0:
            return None
        return self.queue.first(pool, None if free > self.kept_from_batches else _is_no_batch)

    def _hold(self, session: str, running: RunningImage) -> None:
        self._sessions[session].running[running.image_id] = running
        self._running[running.pool] = self._running.get(running.pool, 0) + 1

    def _free(self, running: RunningImage) -> None:
        self._running[running.pool] -= 1

    def _note_death(self, lease: Lease, call_id: str) -> None:
        """Drop the replica that ran this image of a call, because it has died.

        A replica that did not report the image before its death is dropped when it is silent.
        """
        replicas = self._replicas.get(lease.pool, {})
        for name, replica in list(replicas.items()):
            if lease in replica.running:
                others = (
                    self._sessions[one.session].running[one.image_id].call_id
                    for one in replica.running
                    if self.holds(one)
                )
                self._dead.append(DeadReplica(replica.heartbeat, frozenset({call_id, *others})))
                del replicas[name]

    def _count_job(self, waiting: WaitingImage, change: int) -> None:
        """Count an image of a job that waits, or no longer does; those of batches are apart."""
        images, work_s = self._jobs.get(waiting.tenant, (0, 0.0))
        images, work_s = images + change, work_s + change * waiting.work_s
        self._jobs[waiting.tenant] = images, work_s
        if not images:
            del self._jobs[waiting.tenant]

    def _leave_queue(self, waiting: WaitingImage) -> None:
        self.queue.remove(waiting)
        if waiting.of_job:
            self._count_job(waiting, -1)
        self._watched.pop(waiting.number, None)

    def _settle(self, running: RunningImage, took_s: float) -> None:
        self.queue.settle(running.flow, running.pool, took_s - running.work_s)


def _is_no_batch(flow: str) -> bool:
    return not flow.endswith(BATCH)
