"""The Dispatcher deployment: the one owner of queue and limits, exactly one replica, no GPU.

The Dispatcher joins `Admission` and `Grants` with a clock and a network. Each Ingress opens a
session: a stream on which the Dispatcher sends decisions and grants in batches. The Ingress sends
its own updates in batches by `tell`, whose answer holds the events that they cause at once. Each
Generator reports its state by heartbeat. Other files do the rest: `metering` charges tenants,
`scaling` decides how many replicas there should be, `node_watch` reads the cluster's nodes, and
`upkeep` does the periodic work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from autoscaling.load import ScalingLimits
from cluster.placement import Node, NodeRequirement
from cluster.ray_nodes import cluster_id, drain_for_good, living_nodes

from ..models.replica_bounds import other_needs, scaling_limits
from ..settings.application import JobSettings, LiveSettings, Settings
from ..settings.models import Model
from ..tenants.files import KEYS, TENANTS
from ..tenants.keys import TenantChanges
from ..tenants.tenant import Tenant
from .admission import Admission
from .cordoning import Cordoning, read_cordons
from .cordons import Cordons, card_or_node
from .dispatcher_metrics import DispatcherMetrics, TenantMetrics
from .grants import Grants
from .job_backlog import JobBacklog, StoredWork, stored_work
from .jump_file import JumpFile
from .metering import Metering
from .node_watch import NodeWatch
from .overview import nodes_overview, overview
from .protocol import (
    STORED,
    TIMING,
    AdmissionRequest,
    CallAnswer,
    CallQuery,
    CallState,
    Cancelled,
    DispatcherStatus,
    DispatchEvent,
    Heartbeat,
    HeartbeatReply,
    Lease,
    PoolStatus,
    QueuedImage,
    RunningImage,
    SessionMessage,
    SessionUpdate,
    StoppedImage,
    Timing,
    flow_of,
)
from .quarantine import Quarantine
from .ray_default_scaling import RayDefaultScaling
from .recovery import Recovery
from .scaling import Scaling
from .serve_status import ReplicaStates, replica_states
from .sessions import SessionStreams
from .shadows import Shadows
from .shared_limits import SharedLimits
from .shared_results import SharedResults
from .store_link import StoreLink
from .upkeep import Upkeep
from .waiting_calls import WaitingCall, WaitingCalls

if TYPE_CHECKING:
    from ..store.answers import Answer, Claim, Claimed
    from ..usage.leases import BudgetLeases
    from ..usage.ledger import UsageLedger, UsagePage

log = logging.getLogger("ray.serve")

SCALINGS = {"queued-work": Scaling, "ray-default": RayDefaultScaling}  # by `autoscaling_policy`


class Dispatcher:
    """The methods that Ingresses, Generators, operators and Ray Serve call on the Dispatcher.

    `serve.dispatch.client.session` is the Ingress's end of a session.
    """

    def __init__(
        self,
        autoscaling_policy: str = "queued-work",
        database: dict[str, Any] | None = None,
        data_folder: str | None = None,
        tenants_folder: str | None = None,
        keyed: bool = False,
        read_nodes: Callable[[], Iterable[Node]] = living_nodes,
        drain: Callable[[str], None] = drain_for_good,
        read_states: Callable[[], ReplicaStates] = replica_states,
        timing: Timing = TIMING,
        cluster: Callable[[], str] = cluster_id,
    ) -> None:
        """Start the Dispatcher and its background tasks; needs a running event loop.

        The Dispatcher knows no pools before `reconfigure` names them. `read_nodes` returns the
        cluster's nodes, `drain` lets Ray place nothing new on a node, and `read_states` returns the
        states of Ray Serve's replicas; all may block. `database`: the arguments of the `Database`
        of tenants and usage; without it usage is counted in memory only, and lost when this process
        ends. `data_folder`: the folder with the file of cordoned nodes. `tenants_folder`: see
        `StoreLink`. `keyed`: whether only tenants of the database may call. `cluster`: returns an
        id that no other cluster has. Raises `OSError` or
        `ValueError` if the file of cordoned nodes cannot be read.
        """
        self._timing = timing
        self.grants = Grants(
            session_lease_s=timing.session_lease_s,
            replica_lease_s=timing.replica_lease_s,
        )
        self.admission = Admission(self.grants, max_queued=LiveSettings().max_queued)
        self._shadows = Shadows(self.grants)
        now = time.monotonic()
        self.scaling = SCALINGS[autoscaling_policy](self.grants, self.admission, now)
        folder = Path(data_folder).expanduser() if data_folder else None
        jump_file = JumpFile(self.scaling, folder)
        self._metrics, self._tenant_metrics = DispatcherMetrics(), TenantMetrics()
        self.sessions = SessionStreams(self._metrics.messages)
        self.metering = Metering(
            self.admission,
            self._tenant_metrics,
            self.sessions.deliver,
            self._store_changed,
            timing.charge_retry_s,
        )
        self.store: StoreLink | None = None
        self._shared: SharedLimits | None = None
        self._keyed = keyed
        self.recovery = Recovery(timing, read_states, self._begin)
        if database:
            self.store = StoreLink(
                database,
                folder,
                Path(tenants_folder).expanduser() if tenants_folder else None,
                cluster,
                self._store_opened,
                self._change_tenants,
                self._store_changed,
            )
        else:
            self._store_opened(None)
        self.jobs = JobBacklog(self._stored_work, self._jobs_read)
        self._accepted: list[str] = []  # ids of acceptances that ended before this reading
        self._early = WaitingCalls()  # calls that came during the recovery
        self._faults: dict[str, dict[str, str]] = {}  # of Ingresses, by session
        self._quarantine, self._results = Quarantine(), SharedResults()
        self._cordons = Cordons(read_cordons(folder))
        self._positions_due = False
        upkeep = Upkeep(
            self.grants,
            self.admission,
            self.metering,
            self.scaling,
            self._tenant_metrics,
            timing,
        )
        self._nodes = NodeWatch(
            read_nodes,
            drain,
            read_states,
            self.grants,
            self.scaling,
            self._cordons,
            self.sessions.deliver,
        )
        self._cordoning = Cordoning(
            self._cordons, self._nodes, folder, lambda: self.sessions.set_status(self._status())
        )
        self._tasks = [
            asyncio.create_task(work)
            for work in (
                upkeep.run(self.end_session, self._beat, self._may_decide),
                self._nodes.run(timing.nodes_s),
                *(
                    (self.store.run(timing.tenants_s), self.jobs.run(timing.tenants_s))
                    if self.store
                    else ()
                ),
                self._cordoning.run(timing.heartbeat_s),
                jump_file.run(),
                self.metering.run(),
            )
        ]

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply the pools and the live settings of `user_config`, which are all settings.

        Ray Serve calls this at the start and whenever the settings change.
        """
        settings = Settings.model_validate(user_config)
        needs = {
            model.pool_name(pool): pool.need for model in settings.models for pool in model.pools
        }
        self.apply_jobs(settings.models, settings.jobs)
        self.grants.late_slowdown = settings.late_slowdown
        self.apply(needs, scaling_limits(settings), settings.max_queued, other_needs(settings))

    def apply(
        self,
        needs: Mapping[str, NodeRequirement],
        limits: ScalingLimits,
        max_queued: int,
        others: Mapping[str, tuple[NodeRequirement, int]] | None = None,
    ) -> None:
        """Serve these pools from now on, with these limits.

        `needs`: by pool, what one replica needs of a node. `limits`: how many replicas each pool
        may have. `others`: what a replica of each other deployment needs, and how many there are at
        least. Images that wait only for pools that are no longer there are refused.
        """
        self.admission.max_queued = max_queued
        self.grants.set_pools(needs)
        self.scaling.set_limits(limits)
        others = others or {}
        self.scaling.others = {name: least for name, (_, least) in others.items()}
        self._nodes.set_needs(needs, {name: need for name, (need, _) in others.items()})
        self.sessions.deliver(self.grants.refuse())
        self.sessions.set_status(self._status())

    def apply_jobs(self, models: Iterable[Model], settings: JobSettings) -> None:
        """Treat jobs and batches of these models by these settings from now on."""
        self.jobs.set_models(models, settings)
        self.admission.batch_weight = settings.batch_weight
        self.admission.batches_scale = settings.scale_up_for_batches
        self.grants.kept_from_batches = settings.batch_free_slots

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the scaling report, which Ray Serve fetches for `autoscaling.ray_policy`."""
        return self.scaling.report().as_stats()

    # -- Ingresses ------------------------------------------------------------------------------

    async def session(
        self, session: str, calls: list[AdmissionRequest], running: list[RunningImage]
    ) -> AsyncIterator[SessionMessage]:
        """Open an Ingress's session, and yield the messages for that Ingress.

        `session`: the name that the Ingress has chosen. `calls` and `running`: the calls and the
        running images that the Ingress already has, after a restart of the Dispatcher. Opening a
        session under the same name replaces the earlier one. The stream ends when the session
        expires or is replaced.
        """
        self.recovery.reached()
        self.end_session(session)
        stream = self.sessions.open(session, self._status())
        self.grants.open(session, time.monotonic())
        for image in running:
            self.grants.declare(session, image, time.monotonic())
        self._open_calls(session, calls)
        self.recovery.opened(session)
        try:
            async for message in self.sessions.messages(stream):
                yield message
        finally:
            if self.sessions.is_open(session, stream):
                self.end_session(session)

    async def tell(self, session: str, update: SessionUpdate) -> tuple[DispatchEvent, ...] | None:
        """Apply an Ingress's update.

        Returns the events that now wait for this session, so that no message of the stream is
        needed for them. Returns None, and ignores the update, if the session is not open.
        """
        now = time.monotonic()
        self._metrics.messages["update"] += 1
        if not self.grants.heard_from(session, now):
            return None
        for usage in update.usages:
            self.metering.charge(session, usage)
        for usage in update.written:
            self.metering.charge(session, usage, written=True)
        for release in update.releases:
            if self._cordons.suspicious and release.took_s:
                self._clear_suspect(session, release.image_id)
            self._shadows.release(session, release.image_id)
            report = self.grants.release(session, release, now)
            if release.cancelled:
                self.metering.cancelled(session, release.cancelled, report)
        for dead in self.grants.dead():
            log.warning("a replica of %s died on %s", dead.heartbeat.pool, dead.heartbeat.node[:8])
            self._cordons.died(dead.heartbeat, dead.calls, now)
        for call_id in update.ended_calls:
            self.admission.end(session, call_id, now)
        if update.ended_calls and self.admission.any_accepted:
            self.jobs.look()
        for waiting in self._waiting():
            waiting.forget(session, update.ended_calls)
        for result_key in update.finished_results:
            self.sessions.deliver(self._results.finish(session, result_key))
        for image in update.shadows:
            self._shadows.ask(session, image)
        self._open_calls(session, update.admissions)
        self._queue_retries(session, update.retries)
        for request in update.quarantined:
            self._quarantine.add(request, now)
        for id in update.lifted:
            self._quarantine.lift(id)
        faults = dict(update.faults)
        new_faults = faults != self._faults.get(session, {})
        self._faults[session] = faults
        if self.store:
            for id, when in update.keys_used:
                self.store.key_used(id, when)
        for progress in update.progress:
            if call := self.admission.call(session, progress.call_id):
                call.progress = progress
        if update.quarantined or update.lifted or new_faults:
            self.sessions.set_status(self._status())
        for query in update.queries:
            self._answer(session, query)
        return self.sessions.take(session)

    def end_session(self, session: str) -> None:
        """Close a session: remove its images from the queue, free its slots, close its calls."""
        self.grants.close(session, time.monotonic())
        self._shadows.end_session(session)
        self.admission.end_session(session, time.monotonic())
        for waiting in self._waiting():
            waiting.forget(session)
        self.sessions.close(session)
        self.sessions.deliver(self._results.end_session(session))
        if self._faults.pop(session, None):
            self.sessions.set_status(self._status())

    # -- Generators -----------------------------------------------------------------------------

    async def report_replica(
        self,
        heartbeat: Heartbeat,
        running: Iterable[Lease] = (),
        stopped: Iterable[StoppedImage] = (),
    ) -> HeartbeatReply:
        """Note the heartbeat of a Generator, and answer it.

        `running`: the leases of the images that the Generator runs. `stopped`: the images that it
        has stopped since its last heartbeat.
        """
        self.recovery.reached()
        self._metrics.messages["heartbeat"] += 1
        now = time.monotonic()
        slots = self._cordons.heard(heartbeat, now)
        if heartbeat.node in self._cordons.cordoned and heartbeat.node not in self.grants.draining:
            self._nodes.look_again()
        held = self.grants.holds, self._shadows.holds
        running = tuple(running)
        orphans = tuple(lease for lease in running if not any(holds(lease) for holds in held))
        careful = self._cordons.careful(heartbeat, now)
        next_s = self._timing.heartbeat_s
        if not orphans:
            next_s = max(next_s, self.grants.all_living / self._timing.heartbeats_per_s)
        first, freed = self.grants.report_replica(
            heartbeat, now, running, orphans, one_at_a_time=careful, next_s=next_s, slots=slots
        )
        if first:
            self.sessions.set_status(self._status())
        for report in stopped:
            if usage := self.grants.stopped(report, now):
                self.metering.stopped(report.lease.session, usage, report)
        if freed:
            self._grant()
        return HeartbeatReply(orphans, careful, next_s)

    async def outlast(self) -> None:
        """Wait for ever: the call fails when this process ends, and so tells its caller at once."""
        await asyncio.Event().wait()

    # -- operators ------------------------------------------------------------------------------

    async def state(self) -> DispatcherStatus:
        """The number of open calls and queued images, and the status of every pool."""
        return self._status()

    async def overview(self) -> dict[str, Any]:
        """Return what `octet top` shows: all fields of `state`, and rows of tenants and nodes."""
        return {
            **self._status().as_json(),
            "tenants": overview(self.admission, self.grants),
            "nodes": nodes_overview(self._nodes.nodes.values(), self.grants, self._cordons),
        }

    async def usage(self, after: int, limit: int, tenant: str | None) -> UsagePage | None:
        """Return the next usage records; see `UsageLedger.page`. None: there is no store.

        Raises `OSError` if the store cannot be read.
        """
        if self.store is None:
            return None
        if self.metering.ledger is None:
            raise OSError(self.store.fault or "the store is being opened")
        return await asyncio.to_thread(self.metering.ledger.page, after, limit, tenant)

    async def administer(self, operation: str, arguments: dict[str, Any]) -> Any:
        """Read or change tenants and keys; see `StoreLink.administer`. None: there is no store."""
        return await self.store.administer(operation, arguments) if self.store else None

    async def claim(self, claim: Claim) -> Claimed | None:
        """Claim a request with an Idempotency-Key; see `Answers.claim`. None: there is no store.

        Raises `OSError` if the database cannot be used, or the Ingresses are not known yet.
        """
        if self.store is None:
            return None
        if not self.recovery.over or self._database_fault:
            raise OSError(self._database_fault or "the dispatcher is restarting")
        return await self.store.claim(claim, self.sessions.names)

    async def answered(self, claim: Claim, answer: Answer | None) -> None:
        """Remember the answer to a claimed request; see `Answers.finish`."""
        if self.store:
            await self.store.answered(claim, answer)

    async def cordon(self, node: str, reason: str) -> str | None:
        """Give a node no new work; see `Cordoning.cordon`."""
        return await self._cordoning.cordon(node, reason)

    async def uncordon(self, node: str) -> str | None:
        """Let a node get work again; see `Cordoning.uncordon`."""
        return await self._cordoning.uncordon(node)

    async def drain(self) -> int:
        """Refuse new calls from now on. Returns the number of open calls and images together.

        Right after a start the number is at least 1, because Ingresses may not have reported their
        calls yet.
        """
        self.admission.draining = True
        self.sessions.set_status(self._status())
        running = sum(self.grants.running_in(pool) for pool in self.scaling.limits.pools)
        return (
            self.grants.queue_depth + running + self.admission.open_calls + (not self.recovery.over)
        )

    async def check_health(self) -> None:
        """Raise `RuntimeError` if a background task has ended; called by Ray Serve.

        Without its tasks the Dispatcher would, for example, never let a lease expire. Ray Serve
        restarts an unhealthy replica.
        """
        if any(task.done() for task in self._tasks):
            raise RuntimeError("sessions, replicas, nodes, tenants or usage are without their task")

    def _status(self) -> DispatcherStatus:
        return DispatcherStatus(
            draining=self.admission.draining,
            calls=self.admission.open_calls,
            queued=self.grants.queue_depth,
            pools={pool: self._pool_status(pool) for pool in self.scaling.limits.pools},
            faults=self._present_faults(),
            quarantined=self._quarantine.present(time.monotonic()),
            cordoned=tuple(self._cordons.cordoned.values()),
        )

    def _present_faults(self) -> dict[str, str]:
        """The faults of the Ingresses, of the tenants' files and of the store, by their names."""
        found = {part: why for faults in self._faults.values() for part, why in faults.items()}
        found |= self.store.file_faults if self.store else {}
        return found | ({"database": self._database_fault} if self._database_fault else {})

    @property
    def _database_fault(self) -> str:
        """Why charges cannot be written, or tenants not be read, at present; "" if they can."""
        shared = self._shared.fault if self._shared else ""
        return self.metering.fault or (self.store.fault if self.store else "") or shared

    def _pool_status(self, pool: str) -> PoolStatus:
        staying = self.grants.staying(pool)
        return PoolStatus(
            replicas=staying.replicas,
            slots=staying.slots,
            running=self.grants.running_in(pool),
            running_work_s=round(staying.running_work_s, 3),
            speed=round(staying.speed, 3),
            placeable=self.grants.placeable(pool),
            least=self.scaling.limits.pools[pool].min_replicas,
            wanted=self.scaling.replicas[pool],
            reason=self.scaling.reasons.get(pool, ""),
        )

    # -- calls and images -----------------------------------------------------------------------

    def _clear_suspect(self, session: str, image_id: str) -> None:
        """Note on which card an image was generated, if its replica has reported it."""
        image = self.grants.running_image(session, image_id)
        if image and (on := self.grants.runs_on(image)):
            self._cordons.generated(image.call_id, card_or_node(on))

    def _usable(self, heartbeat: Heartbeat, now: float) -> tuple[int, bool]:
        """How many slots of a replica may be used, and whether its card has had a fault."""
        return self._cordons.usable(heartbeat, now), self._cordons.careful(heartbeat, now)

    def _may_decide(self, now: float) -> bool:
        """Return whether every living replica has had time to report itself."""
        return now >= self.recovery.ended_at + self._timing.replica_lease_s

    def _begin(self) -> None:
        """Decide on the calls that arrived during the recovery, and begin to grant."""
        self._decide(self._early.take())
        self.sessions.deliver(self._results.end_leaderless())
        self._grant()

    def _waiting(self) -> Iterable[WaitingCalls]:
        """The calls that wait for a decision, where there are any."""
        places = (self._early, self._shared.waiting if self._shared else None)
        return [waiting for waiting in places if waiting]

    def _decide(self, calls: Iterable[WaitingCall], *, leased: bool = False) -> None:
        """Decide on calls that have waited; `leased`: their work was leased, if it could be."""
        for call in calls:
            if call.session in self.sessions:
                self._open_calls(call.session, [call.at(time.monotonic())], leased=leased)

    def _open_calls(
        self, session: str, requests: Iterable[AdmissionRequest], *, leased: bool = False
    ) -> None:
        now = time.monotonic()
        queued: list[QueuedImage] = []
        for request in requests:
            if not (self.recovery.over or request.accepted or self._database_fault):
                self._early.add(session, request, now)
                continue
            shared = None if leased or self._database_fault else self._shared
            if shared and shared.must_wait(session, request, now):
                continue
            if self._results.must_follow(session, request) and not request.accepted:
                request = request._replace(images=(), work_s=0.0, follows=True)
            decision = self.admission.open(session, request, now)
            if decision.refusal:
                self._tenant_metrics.refused(request.tenant, decision.refusal)
            if not request.accepted:
                self.sessions.deliver([decision._replace(follows=request.follows)])
            if not decision.refusal:
                self._results.admitted(session, request)
                if not request.accepted:
                    self._make_room(request)
                if request.lane in STORED:  # its work is no longer held, but reserved
                    self.jobs.look()
                for usage in request.usages:
                    self.metering.charge(session, usage)
                for image in request.images:
                    self._queue(session, image)
                queued += request.images
        self._grant()
        self._report_positions(queued)

    def _answer(self, session: str, query: CallQuery) -> None:
        """Tell an Ingress about a call, and tell the call's own Ingress to cancel it if asked."""
        call, state = self.admission.find(query.tenant, query.request_id), None
        if call:
            queued, running, position = self.grants.images_of(call.session, call.id)
            age_s = time.monotonic() - call.opened
            state = CallState(queued, running, position, age_s, call.progress)
            if query.cancel:
                self.sessions.deliver([Cancelled(call.session, call.id)])
        self.sessions.deliver([CallAnswer(session, query, state, self.recovery.over)])

    def _make_room(self, request: AdmissionRequest) -> None:
        """Evict waiting images if the queue has no room for those of an admitted call."""
        excess = len(request.images) + self.grants.queue_depth - self.admission.max_queued
        for tenant, evicted in self.grants.evict(excess, newcomer=request.tenant):
            self._tenant_metrics.refused(tenant, evicted.reason)
            self.sessions.deliver([evicted])

    def _queue_retries(self, session: str, images: Iterable[QueuedImage]) -> None:
        for image in images:
            self._queue(session, image)
        self._grant()
        self._report_positions(images)

    def _queue(self, session: str, image: QueuedImage) -> None:
        """Queue an image of an admitted call; nothing happens if the call has ended meanwhile."""
        if (call := self.admission.call(session, image.call_id)) is None:
            return
        refused = self.grants.submit(
            session,
            image,
            flow_of(call.tenant, call.lane),
            time.monotonic(),
            of_job=call.lane == "job",
            deadline=call.deadline,
        )
        if refused:
            self.sessions.deliver([refused])

    def _report_positions(self, images: Iterable[QueuedImage]) -> None:
        """Report all queue positions after `positions_s`, if one of `images` wants to hear its own.

        The reports are collected because finding the positions takes long in a long queue.
        """

        def report() -> None:
            self._positions_due = False
            self.sessions.deliver(self.grants.positions())

        if not self._positions_due and any(image.report_position for image in images):
            self._positions_due = True
            asyncio.get_running_loop().call_later(self._timing.positions_s, report)

    def _grant(self) -> None:
        if self.recovery.over:
            self.sessions.deliver(self.grants.grant(time.monotonic()))
            self.sessions.deliver(self._shadows.stop())

    def _beat(self, lag_s: float) -> None:
        """Grant what can be granted, and send positions and status to the sessions."""
        now = time.monotonic()
        self.grants.refresh(lambda beat: self._usable(beat, now), now)
        self._grant()
        if self.recovery.over:
            self.sessions.deliver(self._shadows.begin(time.monotonic()))
        self.sessions.deliver(self.grants.positions())
        self.sessions.set_status(self._status())
        self._metrics.stored(self.jobs.by_pool())
        faults = self.store.file_faults if self.store else {}
        files = {name: name in faults for name in (TENANTS, KEYS)}
        self._tenant_metrics.faults(files, database=bool(self._database_fault))
        recovering = not self.recovery.over
        cordoned = self._cordons.cordoned.keys() & self._nodes.nodes.keys()
        self._metrics.report(lag_s, len(self.sessions), cordoned, recovering=recovering)

    # -- stored jobs ----------------------------------------------------------------------------

    async def _stored_work(self) -> list[StoredWork]:
        """Read the jobs that wait in the database. Raises `OSError` without the database."""
        self._accepted += self.admission.accepted()  # these are stored by now
        return await self.store.read(stored_work) if self.store else []

    def _jobs_read(self) -> None:
        """Hold the stored work in the budgets, and count it for the number of replicas."""
        self.admission.hold_for_jobs(self.jobs.held())
        self.admission.forget_accepted(self._accepted)
        self._accepted.clear()
        self.scaling.stored = self.jobs.as_queue(self.scaling.limits.tuning.target_wait_s)

    # -- the store ------------------------------------------------------------------------------

    def _store_opened(
        self,
        ledger: UsageLedger | None,
        leases: BudgetLeases | None = None,
        leased: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Begin to charge, and to admit calls.

        `ledger`: None if usage is counted in memory only. `leases`: None if no other cluster shares
        the budgets; else `leased` is what this cluster has leased already.
        """
        self.metering.begin(ledger)
        if leases:
            self._shared = SharedLimits(
                leases,
                self.admission,
                partial(self._decide, leased=True),
                self._store_changed,
                self.metering.quiet,
            )
            self._shared.begin(leased)
            self._tasks.append(asyncio.create_task(self._shared.run(self._timing.tenants_s)))
        self.recovery.knows_usage()

    def _change_tenants(self, changes: TenantChanges, tenants: dict[str, Tenant]) -> None:
        """Apply changed tenants; `tenants`: all that there are now."""
        if self._keyed:
            self.admission.set_tenants(tenants, time.monotonic())
            self.sessions.change_tenants(changes)

    def _store_changed(self) -> None:
        """Note that the database's fault has changed; with a fault, refuse the calls that wait."""
        self.admission.database_fault = self._database_fault
        if self._database_fault:
            self._decide(self._early.take())
        self.sessions.set_status(self._status())
