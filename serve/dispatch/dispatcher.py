"""The Dispatcher deployment: the one owner of queue and limits, exactly one replica, no GPU.

It joins `Admission` and `Grants` with a clock and a network. Each Ingress opens a session, a stream
on which decisions and grants arrive in batches, and sends its updates in batches. Each Generator
reports itself by heartbeat. Other files do the rest: `metering` charges tenants, `scaling` decides
on replicas, `node_watch` looks at the cluster, `upkeep` does what is due with every heartbeat.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from autoscaling.load import PolicyTuning, ScalingLimits
from cluster.placement import Node, NodeRequirement
from cluster.ray_nodes import living_nodes

from ..settings.application import AutoscalingSettings, LiveSettings
from ..tenants.watched_files import TenantFiles
from ..usage.ledger import UsageLedger
from .admission import Admission
from .dispatcher_metrics import TenantMetrics
from .grants import Grants
from .metering import Metering
from .node_watch import NodeWatch
from .overview import overview
from .protocol import (
    TIMING,
    AdmissionRequest,
    Cancelled,
    DispatcherStatus,
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
)
from .ray_default_scaling import RayDefaultScaling
from .scaling import Scaling
from .sessions import SessionStreams
from .upkeep import Upkeep

SCALINGS = {"queued-work": Scaling, "ray-default": RayDefaultScaling}  # by `autoscaling_policy`


class Dispatcher:
    """The Dispatcher's calls; `serve.dispatch.client.session` is the other end of a session."""

    def __init__(
        self,
        pools: Mapping[str, NodeRequirement],
        limits: ScalingLimits,
        autoscaling_policy: str = "queued-work",
        tenants_folder: str | None = None,
        usage_folder: str | None = None,
        read_nodes: Callable[[], Iterable[Node]] = living_nodes,
        timing: Timing = TIMING,
    ) -> None:
        """`pools`: what a replica of each pool needs of a node; `limits`: how many there may be.

        `read_nodes` may block. Without `tenants_folder` any tenant may call, without `usage_folder`
        usage is counted until this process ends. Raises `SettingsError`, `OSError` and `ValueError`
        for what is wrong in these folders.
        """
        self._timing = timing
        self.grants = Grants(
            list(pools),
            session_lease_s=timing.session_lease_s,
            replica_lease_s=timing.replica_lease_s,
        )
        self.admission = Admission(self.grants, max_queued=LiveSettings().max_queued)
        now = time.monotonic()
        self.scaling = SCALINGS[autoscaling_policy](self.grants, self.admission, limits, now)
        self.sessions = SessionStreams()
        self._tenant_metrics = TenantMetrics()
        ledger = UsageLedger(Path(usage_folder).expanduser(), time.time()) if usage_folder else None
        self.metering = Metering(
            self.admission,
            ledger,
            self._tenant_metrics,
            self.sessions.deliver,
            timing.charge_retry_s,
        )
        self._tenants: TenantFiles | None = None
        if tenants_folder:
            self._tenants = TenantFiles(Path(tenants_folder).expanduser())
            self._apply_tenants(self._tenants)
        self._grants_from = now + timing.recovery_s
        self._early: list[tuple[str, AdmissionRequest]] = []  # calls that came before that
        self._positions_due = False
        upkeep = Upkeep(
            self.grants, self.admission, self.metering, self.scaling, self._tenant_metrics, timing
        )
        nodes = NodeWatch(pools, read_nodes, self.grants, self.scaling, self.sessions.deliver)
        decide_from = self._grants_from + timing.replica_lease_s
        self._tasks = [
            asyncio.create_task(work)
            for work in (
                upkeep.run(self.end_session, self._grant_and_tell, decide_from),
                nodes.run(timing.nodes_s),
                self._watch_tenants(),
                self.metering.run(),
            )
        ]
        asyncio.get_running_loop().call_later(timing.recovery_s, self._begin)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply parts of `LiveSettings`; called by Ray Serve at the start and on changes."""
        self.admission.max_queued = user_config["max_queued"]
        settings = AutoscalingSettings.model_validate(user_config.get("autoscaling", {}))
        self.scaling.tune(PolicyTuning(**settings.model_dump()))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The scaling report; called by Ray Serve for `autoscaling.ray_policy`."""
        return self.scaling.report().as_stats()

    # -- Ingresses ------------------------------------------------------------------------------

    async def session(
        self, session: str, calls: list[AdmissionRequest], running: list[RunningImage]
    ) -> AsyncIterator[SessionMessage]:
        """Open a session with the calls that are open and the images that run at an Ingress.

        Opening a session again replaces it. The stream ends when the session expires or is
        replaced.
        """
        self.end_session(session)
        stream = self.sessions.open(session)
        self.grants.open(session, time.monotonic())
        for image in running:
            self.grants.declare(session, image)
        self._open_calls(session, calls)
        try:
            async for message in self.sessions.messages(stream):
                yield message
        finally:
            if self.sessions.is_open(session, stream):
                self.end_session(session)

    async def tell(self, session: str, update: SessionUpdate) -> bool:
        """Apply an Ingress's update. False if its session is not open."""
        now = time.monotonic()
        if not self.grants.heard_from(session, now):
            return False
        for usage in update.usages:
            self.metering.charge(session, usage)
        for release in update.releases:
            report = self.grants.release(session, release, now)
            if release.cancelled:
                self.metering.cancelled(session, release.cancelled, report)
        for call_id in update.ended_calls:
            self.admission.end(session, call_id, now)
        if self._early:
            self._early = [
                (s, request)
                for s, request in self._early
                if s != session or request.call_id not in update.ended_calls
            ]
        self._open_calls(session, update.admissions)
        self._queue_retries(session, update.retries)
        return True

    async def cancel(self, tenant: str, request_id: str) -> bool | None:
        """End a tenant's call by its request id, at whichever Ingress; False if there is none.

        None right after a start, when an Ingress may not yet have said that it has such a call.
        """
        if (call := self.admission.find(tenant, request_id)) is None:
            return None if time.monotonic() < self._grants_from else False
        self.sessions.deliver([Cancelled(call.session, call.id)])
        return True

    def end_session(self, session: str) -> None:
        """Close a session: its images leave the queue, its slots are free, its calls are closed."""
        self.grants.close(session)
        self.admission.end_session(session, time.monotonic())
        self._early = [early for early in self._early if early[0] != session]
        self.sessions.close(session)

    # -- Generators -----------------------------------------------------------------------------

    async def report_replica(
        self,
        heartbeat: Heartbeat,
        running: Iterable[Lease] = (),
        stopped: Iterable[StoppedImage] = (),
    ) -> HeartbeatReply:
        """Note the heartbeat of a Generator, the leases that it runs and what it has stopped."""
        now = time.monotonic()
        self.grants.report_replica(heartbeat, now, running)
        for report in stopped:
            if usage := self.grants.stopped(report, now):
                self.metering.stopped(report.lease.session, usage, report)
        self._grant()
        orphans = tuple(lease for lease in running if not self.grants.holds(lease))
        return HeartbeatReply(orphans, heartbeat.node in self.grants.draining)

    # -- operators ------------------------------------------------------------------------------

    async def state(self) -> DispatcherStatus:
        """The number of open calls and queued images, and the status of every pool."""
        return DispatcherStatus(
            draining=self.admission.draining,
            calls=self.admission.open_calls,
            queued=self.grants.queue_depth,
            pools={pool: self._pool_status(pool) for pool in self.scaling.limits.pools},
        )

    async def overview(self) -> dict[str, Any]:
        """`state`, faults of the tenants' files, and a row for each tenant: for `octet top`."""
        status = await self.state()
        return {
            **status.as_json(),
            "faults": self._tenants.faults if self._tenants else {},
            "tenants": overview(self.admission, self.grants),
        }

    async def drain(self) -> int:
        """Refuse new calls from now on; returns how many calls and images are still open.

        At least one right after a start, when Ingresses have not yet said what they have.
        """
        self.admission.draining = True
        unheard = time.monotonic() < self._grants_from
        running = sum(self.grants.running_in(pool) for pool in self.scaling.limits.pools)
        return self.grants.queue_depth + running + self.admission.open_calls + unheard

    async def check_health(self) -> None:
        """Raise `RuntimeError` if a task has ended: leases would never expire. For Ray Serve."""
        if any(task.done() for task in self._tasks):
            raise RuntimeError("sessions, replicas, nodes, tenants or usage are without their task")

    def _pool_status(self, pool: str) -> PoolStatus:
        staying = self.grants.staying(pool)
        return PoolStatus(
            replicas=len(staying),
            slots=self.grants.slots(pool),
            running=self.grants.running_in(pool),
            running_work_s=round(sum(replica.running_work_s for replica in staying), 3),
            speed=round(sum(replica.speed for replica in staying), 3),
            placeable=self.grants.placeable(pool),
            least=self.scaling.limits.pools[pool].min_replicas,
            wanted=self.scaling.replicas[pool],
            reason=self.scaling.reasons.get(pool, ""),
        )

    # -- calls and images -----------------------------------------------------------------------

    def _begin(self) -> None:
        """Admit the calls that came early: by now every Ingress has said what it has."""
        self._grants_from = min(self._grants_from, time.monotonic())  # timers may fire early
        early, self._early = self._early, []
        for session, request in early:
            if session in self.sessions:
                self._open_calls(session, [request])
        self._grant()

    def _open_calls(self, session: str, requests: Iterable[AdmissionRequest]) -> None:
        now = time.monotonic()
        queued: list[QueuedImage] = []
        for request in requests:
            if now < self._grants_from and not request.accepted:
                self._early.append((session, request))
                continue
            decision = self.admission.open(session, request, now)
            if decision.refusal:
                self._tenant_metrics.refused(request.tenant, decision.refusal)
            if not request.accepted:
                self.sessions.deliver([decision])
            if not decision.refusal:
                for image in request.images:
                    self._queue(session, image, request.tenant)
                queued += request.images
        self._grant()
        self._report_positions(queued)

    def _queue_retries(self, session: str, images: Iterable[QueuedImage]) -> None:
        for image in images:
            if call := self.admission.call(session, image.call_id):
                self._queue(session, image, call.tenant)
        self._grant()
        self._report_positions(images)

    def _queue(self, session: str, image: QueuedImage, tenant: str) -> None:
        if refused := self.grants.submit(session, image, tenant, time.monotonic()):
            self.sessions.deliver([refused])

    def _report_positions(self, images: Iterable[QueuedImage]) -> None:
        """Report queue positions soon and all at once: finding them takes long in a long queue."""

        def report() -> None:
            self._positions_due = False
            self.sessions.deliver(self.grants.positions())

        if not self._positions_due and any(image.report_position for image in images):
            self._positions_due = True
            asyncio.get_running_loop().call_later(self._timing.positions_s, report)

    def _grant(self) -> None:
        if time.monotonic() >= self._grants_from:
            self.sessions.deliver(self.grants.grant())

    def _grant_and_tell(self) -> None:
        self._grant()
        self.sessions.deliver(self.grants.positions())

    # -- tenants --------------------------------------------------------------------------------

    async def _watch_tenants(self) -> None:
        while True:
            await asyncio.sleep(self._timing.tenants_s)
            files = self._tenants
            if files is not None and await asyncio.to_thread(files.read):
                self._apply_tenants(files)

    def _apply_tenants(self, files: TenantFiles) -> None:
        self.admission.set_tenants(files.tenants)
        self.sessions.set_tenants(files.directory)
