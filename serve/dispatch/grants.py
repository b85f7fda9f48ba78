"""Grants of free slots to waiting images: the Dispatcher's state, without clock, network or Ray.

A *slot* is room for one image on one replica. A *grant* gives a free slot to one waiting image:
`fair_queue` chooses the image among those that may use the pool, and `replicas` chooses the
replica. An image is bound to a pool and a replica only by its grant, so no image waits while one of
its pools has a free slot. A grant is a lease that is held by the *session* (one Ingress replica)
which queued the image. A session that falls silent loses all of its images and slots.

A pool is *possible* if it has a living replica, or if a node could hold one. An image without a
possible pool is refused at once, because it would wait in vain.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
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
from .replicas import Capacity, PoolReplicas
from .settlement import Settlement

COUNTED_S = 600.0  # a session that comes back later than that may count its images again
UNKNOWN_S = 10.0  # for this time, a pool that is not in the settings may still be on its way
EXCESS_S = 600.0  # Ray Serve stops no replica in excess later than that
REPORTED_POSITIONS = 1000  # images further back hear their position when they have come nearer
NO_REPLICAS = Capacity()


@dataclass(slots=True, eq=False)
class WaitingImage:
    """An image in the fair queue. Within a tenant, images of requests come before those of jobs.

    `tenant`: the name under which it queues, see `flow_of`. `since`: the time at which it arrived;
    a further attempt at an image keeps the time of the first. `late_at`: when it can no longer be
    done in time. `last`: it waits behind all others of its tenant. `number`, `late`: set by the
    queue. `position`: its place in the queue as last reported; 0 before the first report.
    """

    image: QueuedImage
    tenant: str
    session: str
    since: float
    late_at: float = math.inf
    last: bool = False
    number: int = 0
    late: bool = False
    position: int = 0

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


class DeadReplica(NamedTuple):
    """A replica that has died: its last heartbeat, and the calls whose images died with it."""

    heartbeat: Heartbeat
    calls: frozenset[str]


class Grants:
    """The queue, the slots and the leases of all sessions."""

    def __init__(self, *, session_lease_s: float, replica_lease_s: float) -> None:
        """`session_lease_s`: how long a session may be silent.

        `replica_lease_s`: how long a replica's heartbeat may be overdue.
        """
        self.queue: FairQueue[WaitingImage] = FairQueue(deferrable=_is_batch)
        self.session_lease_s = session_lease_s
        self.replica_lease_s = replica_lease_s
        self.kept_from_batches = 0  # free slots of each pool that batches leave to others
        self.late_slowdown: float | None = None  # see `submit`
        self._sessions: dict[str, _Session] = {}
        self._pools: dict[str, PoolReplicas] = {}
        self._retired: dict[str, PoolReplicas] = {}  # of pools that are not there, but run images
        self._draining: frozenset[str] = frozenset()
        self._on_card: Counter[str] = Counter()  # running images by card
        self._on_node: Counter[str] = Counter()  # replicas by node
        self._removed: frozenset[str] = frozenset()  # pools that are no longer there
        self._unknown: dict[str, float] = {}  # pools that nobody has named yet, and since when
        self._placeable: frozenset[str] | None = None  # None: not known yet, any pool may come
        self._jobs: dict[str, tuple[int, float]] = {}  # waiting images of jobs and their work
        self._dead: list[DeadReplica] = []  # not yet returned by `dead`
        self._watched: dict[int, WaitingImage] = {}  # those that report their position, by number
        self._settlement = Settlement()
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
                self._free(session, running, now)
                self._settle(running, running.work_s)
                self._counted[session, running.image_id] = now

    def heard_from(self, session: str, now: float) -> bool:
        """Renew a session's lease. Returns False if the session is not open."""
        if session not in self._sessions:
            return False
        self._sessions[session].last_heard = now
        return True

    def declare(self, session: str, running: RunningImage, now: float) -> None:
        """Count an image that runs already, because its slot was granted before the session began.

        Its work counts once, however often the session is opened again.
        """
        self._hold(session, running, now)
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
        deadline: float = math.inf,
    ) -> Refused | None:
        """Queue an image under the name `flow`; returns a refusal if no pool of it is possible.

        `of_job`: whether it waits behind the images of the tenant's requests. `deadline`: the time
        after which nobody wants it. An image is *late* when it cannot be done by its deadline any
        more, or within `late_slowdown` times the seconds that it takes alone. A late image stands
        behind those of its tenant that can still be in time.
        """
        holder = self._sessions[session]
        if image.id in holder.waiting or image.id in holder.running:
            return None
        if not self.possible(image.pools):
            return Refused(session, image.id)
        for pool in image.pools:
            if pool not in self._pools and pool not in self._removed:
                self._unknown.setdefault(pool, now)
        since = now - image.waited_s
        late_at = math.inf
        if self.late_slowdown is not None and not of_job and not flow.endswith(BATCH):
            alone_s = self._alone_s(image)
            late_at = min(since + self.late_slowdown * alone_s, deadline) - alone_s
        waiting = WaitingImage(image, flow, session, since, late_at, last=of_job)
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
            if release.lost:
                self._note_death(running, now)
            elif release.refused and running.pool in self._pools:
                until = now + self.replica_lease_s
                self._pools[running.pool].avoid(running.replica, until, now)
            self._free(session, running, now)
            if release.took_s is not None:
                self._settle(running, release.took_s)
                return None
            report = self._settlement.given_back(session, running, release.cancelled, now)
            if report is None:
                return "awaited"
            self._settle(running, report.work_s)
            return report
        return None

    def dead(self) -> list[DeadReplica]:
        """The replicas that have died while they ran images, since the last call."""
        dead, self._dead = self._dead, []
        return dead

    def expire_replicas(self, now: float) -> None:
        """Drop the replicas that have fallen silent."""
        for replicas in self._pools.values():
            replicas.expire(now, self.replica_lease_s)

    def runs_on(self, image: RunningImage) -> Heartbeat | None:
        """The last heartbeat of the replica that runs an image; None if it is not known."""
        if image.pool not in self._pools:
            return None
        replica = self._pools[image.pool].get(image.replica)
        return replica.heartbeat if replica else None

    def expire(self, now: float) -> list[str]:
        """Drop sessions that have fallen silent; returns their names."""
        late = {pool for pool, since in self._unknown.items() if now - since > UNKNOWN_S}
        self._removed |= late
        self._unknown = {p: at for p, at in self._unknown.items() if p not in late}
        for replicas in self._pools.values():
            since = replicas.excess_since
            if since is not None and now - since > EXCESS_S:
                replicas.keep_all(now)
        self._retired = {p: replicas for p, replicas in self._retired.items() if replicas.running}
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
        """Note a replica's heartbeat, unless its pool no longer exists; see `PoolReplicas.hear`."""
        if (replicas := self._pools.get(heartbeat.pool)) is None:
            return False, False
        return replicas.hear(
            heartbeat,
            now,
            running,
            unheld,
            one_at_a_time=one_at_a_time,
            next_s=next_s,
            slots=slots,
        )

    def refresh(self, usable: Callable[[Heartbeat], tuple[int, bool]], now: float) -> None:
        """Count the free slots of all replicas again; see `PoolReplicas.refresh`."""
        for replicas in self._pools.values():
            replicas.refresh(usable, now)

    def stopped(self, report: StoppedImage, now: float) -> UsageRecord | None:
        """Note a Generator's report of a stopped image.

        Returns the image's usage record with its full charge, if its client had cancelled it and
        its slot was given back before this report.
        """
        unsettled = self._settlement.reported(report, now, held=self.holds(report.lease))
        if unsettled is None:
            return None
        self._settle(unsettled.image, report.work_s)
        return unsettled.cancelled

    def give_up(self, now: float) -> list[UsageRecord]:
        """Settle stopped images that no Generator has reported for `UNSETTLED_S`.

        Each counts with its predicted work. Returns the usage records of those images that their
        clients had cancelled.
        """
        lost = self._settlement.give_up(now)
        for unsettled in lost:
            self._settle(unsettled.image, unsettled.image.work_s)
        return [unsettled.cancelled for unsettled in lost if unsettled.cancelled]

    def keep(self, pool: str, replicas: int, now: float) -> None:
        """Let at most `replicas` of the pool's current replicas get new grants.

        Ray Serve will stop the others.
        """
        self._pools[pool].keep(replicas, now)

    def in_excess(self) -> list[str]:
        """The pools of which some replicas get no new grants."""
        return [pool for pool, r in self._pools.items() if r.excess_since is not None]

    def keep_all(self, pool: str, now: float) -> None:
        """Let all replicas of the pool get new grants again, because Ray Serve stops none."""
        self._pools[pool].keep_all(now)

    @property
    def draining(self) -> frozenset[str]:
        """The ids of the nodes that are about to go."""
        return self._draining

    def set_draining(self, nodes: frozenset[str], now: float) -> None:
        """Let replicas on these nodes get no new grants."""
        if nodes != self._draining:
            self._draining = nodes
            for replicas in self._pools.values():
                replicas.set_draining(nodes, now)

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

    def grant(self, now: float) -> list[Granted]:
        """Give every free slot to the image that is next in the fair queue of its pool."""
        granted: list[Granted] = []
        if not len(self.queue):
            return granted
        for pool in self._pools:
            while waiting := self._next_in(pool, now):
                # Pools come in order of preference, but a further attempt may prefer another one.
                best = next(
                    p for p in waiting.pools if p == pool or self._next_in(p, now) is waiting
                )
                image = waiting.image
                replica = self._pools[best].choose(image, now)
                if replica is None:
                    raise RuntimeError(f"{best} has a free slot, but no replica with one")
                name = replica.heartbeat.replica
                self.queue.take(waiting, best)
                if waiting.last:
                    self._count_job(waiting, -1)
                self._watched.pop(waiting.number, None)
                del self._sessions[waiting.session].waiting[image.id]
                running = RunningImage(
                    image.id, image.call_id, waiting.tenant, best, image.work_s, name, image.size
                )
                self._hold(waiting.session, running, now)
                granted.append(Granted(waiting.session, image.id, best, name, waiting.tenant))
        return granted

    def refuse(self) -> list[Refused]:
        """Take images that have no possible pool any more out of the queue; returns refusals."""
        possible: dict[Pools, bool] = {}
        for waiting in self.queue:
            if waiting.pools not in possible:
                possible[waiting.pools] = self.possible(waiting.pools)
        hopeless = [waiting for waiting in self.queue if not possible[waiting.pools]]
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
        watching: dict[str, int] = {}
        for waiting in self._watched.values():
            for pool in waiting.pools:
                watching[pool] = watching.get(pool, 0) + 1
        found: dict[int, int] = {}
        for pool, left in watching.items():
            in_order = islice(self.queue.order(pool), REPORTED_POSITIONS)
            for place, waiting in enumerate(in_order, 1):
                if waiting.number in self._watched:
                    found[waiting.number] = min(place, found.get(waiting.number, place))
                    left -= 1
                    if not left:
                        break
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
        before, self._pools = self._pools, {}
        for pool in pools:
            known = before.get(pool, self._retired.pop(pool, None))
            self._pools[pool] = self._new_pool() if known is None else known
        gone = before.keys() - self._pools.keys()
        for pool in gone:
            for name in [replica.heartbeat.replica for replica in before[pool]]:
                before[pool].drop(name, 0.0)
            self._retired[pool] = before[pool]
        self._removed = (self._removed | gone) - self._pools.keys()
        self._unknown = {p: at for p, at in self._unknown.items() if p not in self._pools}
        if self._placeable is not None:
            self._placeable |= self._pools.keys() - before.keys()

    def _new_pool(self) -> PoolReplicas:
        replicas = PoolReplicas(self._on_card, self._on_node)
        replicas.set_draining(self._draining, 0.0)
        return replicas

    @property
    def pools(self) -> list[str]:
        """The names of the pools that there are now."""
        return list(self._pools)

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
            self.placeable(pool) or self._pools[pool].living > 0
            if pool in self._pools
            else pool not in self._removed
            for pool in pools
        )

    def free_slots(self, pool: str) -> int:
        """The number of free slots on the staying replicas."""
        return self._pools[pool].free if pool in self._pools else 0

    def replicas(self, pool: str) -> list[Heartbeat]:
        """The last heartbeat of each living replica."""
        return [replica.heartbeat for replica in self._pools.get(pool, ())]

    @property
    def all_living(self) -> int:
        """The number of living replicas of all pools."""
        return sum(replicas.living for replicas in self._pools.values())

    def living(self, pool: str) -> int:
        """The number of living replicas."""
        return self._pools[pool].living if pool in self._pools else 0

    def staying(self, pool: str) -> Capacity:
        """The sum of the staying replicas, which may get new grants.

        A replica is leaving if Ray Serve is about to stop it, or if its node is being drained.
        """
        return self._pools[pool].staying if pool in self._pools else NO_REPLICAS

    def idlest(self, pool: str, now: float) -> str:
        """The name of the pool's staying replica that would be done first; "" without any."""
        if pool not in self._pools:
            return ""
        chosen = self._pools[pool].choose(QueuedImage((pool,)), now)
        return chosen.heartbeat.replica if chosen else ""

    @property
    def queue_depth(self) -> int:
        """The number of waiting images."""
        return len(self.queue)

    def running_in(self, pool: str) -> int:
        """The number of granted slots of a pool."""
        replicas = self._pools.get(pool, self._retired.get(pool))
        return 0 if replicas is None else replicas.running

    def running_by_tenant(self) -> Counter[str]:
        """The number of granted slots of each tenant."""
        sessions = self._sessions.values()
        return Counter(
            tenant_of(image.flow) for held in sessions for image in held.running.values()
        )

    def _next_in(self, pool: str, now: float) -> WaitingImage | None:
        """The image that the pool's next free slot belongs to; None without a free slot."""
        replicas = self._pools.get(pool)
        if replicas is None or replicas.free <= 0:
            return None
        return self.queue.first(pool, now, deferrable=replicas.free > self.kept_from_batches)

    def _alone_s(self, image: QueuedImage) -> float:
        """Seconds that the image takes alone in the fastest of its pools, as far as is known."""
        fastest = 0.0
        for pool in image.pools:
            staying = self.staying(pool)
            if staying.replicas:
                fastest = max(fastest, staying.speed / staying.replicas)
        return image.work_s / (fastest or 1.0)

    def _hold(self, session: str, running: RunningImage, now: float) -> None:
        self._sessions[session].running[running.image_id] = running
        pool = running.pool
        if (replicas := self._pools.get(pool, self._retired.get(pool))) is None:
            replicas = self._retired[pool] = self._new_pool()
        replicas.hold(running.replica, (session, running.image_id), running, now)

    def _free(self, session: str, running: RunningImage, now: float) -> None:
        replicas = self._pools.get(running.pool, self._retired.get(running.pool))
        if replicas is not None:
            replicas.release(running.replica, (session, running.image_id), now)

    def _note_death(self, running: RunningImage, now: float) -> None:
        """Drop the replica that ran an image, because it has died."""
        replicas = self._pools.get(running.pool)
        replica = None if replicas is None else replicas.drop(running.replica, now)
        if replica:
            calls = frozenset(image.call_id for image in replica.held.values())
            self._dead.append(DeadReplica(replica.heartbeat, calls))

    def _count_job(self, waiting: WaitingImage, change: int) -> None:
        """Count an image of a job that waits, or no longer does; those of batches are apart."""
        images, work_s = self._jobs.get(waiting.tenant, (0, 0.0))
        images, work_s = images + change, work_s + change * waiting.work_s
        self._jobs[waiting.tenant] = images, work_s
        if not images:
            del self._jobs[waiting.tenant]

    def _leave_queue(self, waiting: WaitingImage) -> None:
        self.queue.remove(waiting)
        if waiting.last:
            self._count_job(waiting, -1)
        self._watched.pop(waiting.number, None)

    def _settle(self, running: RunningImage, took_s: float) -> None:
        self.queue.settle(running.flow, running.pool, took_s - running.work_s)


def _is_batch(flow: str) -> bool:
    return flow.endswith(BATCH)
