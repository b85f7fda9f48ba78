"""The Dispatcher deployment: the one owner of the queue, exactly one replica, no GPU.

It is `Admission` and `Grants` with a clock, a network and two folders: `TenantFiles` says who may
call, `Metering` charges them. Each Ingress opens a stream on which verdicts and
outcomes arrive in batches, and tells its news in batches; each Generator reports itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from autoscaling.load import PolicyTuning, ScalingLimits
from cluster.placement import Node, NodeRequirement, fits, unknown_cards
from cluster.ray_nodes import living_nodes

from ..settings.application import AutoscalingSettings, LiveSettings
from ..tenants.keys import TenantDirectory
from ..tenants.watched_files import TenantFiles
from ..usage.ledger import UsageLedger, month_of
from .admission import Admission
from .dispatcher_metrics import PoolMetrics, TenantMetrics
from .grants import Grants
from .metering import Metering
from .overview import overview
from .protocol import (
    HEARTBEAT_S,
    REPLICA_LEASE_S,
    SESSION_LEASE_S,
    AdmissionDecision,
    AdmissionRequest,
    Heartbeat,
    HeartbeatReply,
    Lease,
    Outcome,
    QueuedImage,
    RunningImage,
    SessionUpdate,
    StoppedImage,
)
from .scaling import Scaling

log = logging.getLogger("ray.serve")

POSITIONS_S = 0.05  # until places in the queue are told
NODES_S = 2.0  # how often the cluster's nodes are looked up
TENANTS_S = 1.0  # how often the tenants' files are looked at
RECOVERY_S = 2.0  # after a restart nothing is granted until every Ingress could say what runs

Told = list[Outcome | AdmissionDecision] | TenantDirectory


class _Stream:
    """What one session has still to be told."""

    def __init__(self, directory: TenantDirectory) -> None:
        self.directory: TenantDirectory | None = directory
        self.told: list[Outcome | AdmissionDecision] = []
        self.news = asyncio.Event()
        self.news.set()
        self.ended = False


class Dispatcher:
    """See `serve.dispatch.session` for the other end of `session` and `tell`."""

    def __init__(
        self,
        pools: Mapping[str, NodeRequirement],
        limits: ScalingLimits,
        autoscaling_policy: str = "queued-work",
        tenants_folder: str | None = None,
        usage_folder: str | None = None,
        read_nodes: Callable[[], Iterable[Node]] = living_nodes,
        recovery_s: float = RECOVERY_S,
    ) -> None:
        """`pools`: what one replica of each needs; `limits`: how many there may be.

        `read_nodes` may block.

        Without `tenants_folder` there are no tenants to know, without `usage_folder` usage is
        counted until this process ends. Raises `SettingsError`, `OSError` and `ValueError` for
        what these folders hold.
        """
        self._pools, self._read_nodes = pools, read_nodes
        self._grants = Grants(
            list(pools), session_lease_s=SESSION_LEASE_S, replica_lease_s=REPLICA_LEASE_S
        )
        self._admission = Admission(self._grants, max_queued=LiveSettings().max_queued)
        now, ours = time.monotonic(), autoscaling_policy == "queued-work"
        self._scaling = Scaling(self._grants, self._admission, limits, now, ours=ours)
        self._grants_from = now + recovery_s
        self._early: list[tuple[str, AdmissionRequest]] = []  # calls that came before that
        self._streams: dict[str, _Stream] = {}
        self._warned: set[str] = set()
        self._positions_due = False
        self._tenants: TenantFiles | None = None
        self._directory: TenantDirectory = {}
        if tenants_folder:
            self._tenants = TenantFiles(Path(tenants_folder).expanduser())
            self._take_tenants()
        ledger = UsageLedger(Path(usage_folder).expanduser(), time.time()) if usage_folder else None
        self._metrics, self._pool_metrics = TenantMetrics(), PoolMetrics()
        self._metering = Metering(self._admission, ledger, self._metrics, self._deliver)
        self._tasks = [
            asyncio.create_task(task())
            for task in (self._expire, self._place, self._watch_tenants, self._metering.run)
        ]
        asyncio.get_running_loop().call_later(recovery_s, self._begin)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve with parts of `LiveSettings`, at the start and when they change."""
        self._admission.max_queued = user_config["max_queued"]
        tuning = AutoscalingSettings.model_validate(user_config.get("autoscaling", {}))
        self._scaling.tune(PolicyTuning(**tuning.model_dump()))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve for `autoscaling.ray_policy`."""
        return self._scaling.reported()

    # -- Ingresses ------------------------------------------------------------------------------

    async def session(
        self, session: str, calls: list[AdmissionRequest], running: list[RunningImage]
    ) -> AsyncIterator[Told]:
        """What becomes of the calls of one Ingress, from those that it has open and runs.

        Opening a session again replaces it. Ends when it expires or is replaced. The directory of
        tenants comes first, and again whenever it changes.
        """
        self._end(session)
        stream = self._streams[session] = _Stream(self._directory)
        self._grants.open(session, time.monotonic())
        for entry in running:
            self._grants.declare(session, entry)
        self._open_calls(session, calls)
        try:
            while not stream.ended:
                await stream.news.wait()
                stream.news.clear()
                known, stream.directory = stream.directory, None
                if known is not None:
                    yield known
                told, stream.told = stream.told, []
                if told:
                    yield told
        finally:
            if self._streams.get(session) is stream:
                self._end(session)

    async def tell(self, session: str, news: SessionUpdate) -> bool:
        """What happened at one Ingress since it last spoke. False if its session is not open."""
        now = time.monotonic()
        if not self._grants.heard_from(session, now):
            return False
        for usage in news.usages:
            self._metering.charge(session, usage)
        for release in news.releases:
            said = self._grants.release(session, release, now)
            if release.cancelled:
                self._metering.cancelled(session, release.cancelled, said)
        for call in news.ended:
            self._admission.end(session, call, now)
        if self._early:
            self._early = [
                (s, o) for s, o in self._early if s != session or o.call not in news.ended
            ]
        self._open_calls(session, news.openings)
        self._submit(session, news.submits)
        return True

    async def cancel(self, tenant: str, request_id: str) -> bool | None:
        """End a tenant's call with this id, at whichever Ingress; False if there is none.

        None right after a start, when an Ingress may not yet have said that there is.
        """
        if (call := self._admission.find(tenant, request_id)) is None:
            return None if time.monotonic() < self._grants_from else False
        self._deliver([Outcome(call.session, call.name, None, "cancelled")])
        return True

    # -- Generators -----------------------------------------------------------------------------

    async def report_replica(
        self, said: Heartbeat, drawing: Iterable[Lease] = (), stopped: Iterable[StoppedImage] = ()
    ) -> HeartbeatReply:
        """The heartbeat of a Generator replica."""
        now = time.monotonic()
        self._grants.report_replica(said, now, drawing)
        for one in stopped:
            if usage := self._grants.stopped(one, now):
                self._metering.stopped(one.lease.session, usage, one)
        self._grant()
        orphans = tuple(lease for lease in drawing if not self._grants.holds(lease))
        return HeartbeatReply(orphans, said.node in self._grants.draining)

    # -- those who operate it -------------------------------------------------------------------

    async def state(self) -> dict[str, Any]:
        """Open `calls` of clients, `queued` images, and of each pool what its replicas say.

        `running`: images granted to the pool; `speed`: reference replicas that it amounts to;
        `wanted`: replicas, `least` of which there are always, and why their number last changed.
        """
        pools = {}
        for pool in self._pools:
            replicas = self._grants.staying(pool)
            pools[pool] = {
                "replicas": len(replicas),
                "slots": self._grants.slots(pool),
                "running": self._grants.running_in(pool),
                "running_work_s": round(sum(said.running_work_s for said in replicas), 3),
                "speed": round(sum(said.speed for said in replicas), 3),
                "placeable": self._grants.placeable(pool),
                "least": self._scaling.limits.pools[pool].min_replicas,
                "wanted": self._scaling.replicas[pool],
                "reason": self._scaling.reasons.get(pool, ""),
            }
        return {
            "draining": self._admission.draining,
            "calls": self._admission.open_calls,
            "queued": self._grants.queue_depth,
            "pools": pools,
        }

    async def overview(self) -> dict[str, Any]:
        """`state`, and what each tenant has under way and has used: for `octet top`."""
        faults = self._tenants.faults if self._tenants else {}
        tenants = overview(self._admission, self._grants)
        return {**await self.state(), "faults": faults, "tenants": tenants}

    async def drain(self) -> int:
        """Refuse new images from now on; returns how many calls and images are still open.

        At least one right after a start, when Ingresses have not yet said what they have.
        """
        self._admission.draining = True
        unheard = time.monotonic() < self._grants_from
        running = sum(self._grants.running_in(pool) for pool in self._pools)
        return self._grants.queue_depth + running + self._admission.open_calls + unheard

    async def check_health(self) -> None:
        """Called by Ray Serve; without expiry the slots of a dead Ingress would stay taken."""
        if any(task.done() for task in self._tasks):
            raise RuntimeError("sessions, replicas, nodes, tenants or usage are without their task")

    # -- calls and entries ----------------------------------------------------------------------

    def _begin(self) -> None:
        """Every Ingress could say by now what it has: limits are known, so calls are admitted."""
        self._grants_from = min(self._grants_from, time.monotonic())  # timers may be early
        early, self._early = self._early, []
        for session, opening in early:
            if session in self._streams:
                self._open_calls(session, [opening])
        self._grant()

    def _open_calls(self, session: str, openings: Iterable[AdmissionRequest]) -> None:
        now = time.monotonic()
        entries: list[QueuedImage] = []
        for opening in openings:
            if now < self._grants_from and not opening.accepted:
                self._early.append((session, opening))
                continue
            verdict = self._admission.open(session, opening, now)
            if verdict.refusal:
                self._metrics.refused(opening.tenant, verdict.refusal)
            if not opening.accepted:
                self._deliver([verdict])
            if not verdict.refusal:
                for entry in opening.entries:
                    self._queue(session, entry, opening.tenant)
                entries += opening.entries
        self._grant()
        self._tell_positions(entries)

    def _submit(self, session: str, entries: Iterable[QueuedImage]) -> None:
        """Further attempts."""
        for entry in entries:
            if call := self._admission.call(session, entry.call):
                self._queue(session, entry, call.tenant)
        self._grant()
        self._tell_positions(entries)

    def _queue(self, session: str, entry: QueuedImage, tenant: str) -> None:
        if refused := self._grants.submit(session, entry, tenant, time.monotonic()):
            self._deliver([refused])

    def _tell_positions(self, entries: Iterable[QueuedImage]) -> None:
        """Soon, and all together: it takes time that grows with the queue."""

        def tell() -> None:
            self._positions_due = False
            self._deliver(self._grants.positions())

        if not self._positions_due and any(entry.watched for entry in entries):
            self._positions_due = True
            asyncio.get_running_loop().call_later(POSITIONS_S, tell)

    def _grant(self) -> None:
        if time.monotonic() >= self._grants_from:
            self._deliver(self._grants.grant())

    def _deliver(self, told: Iterable[Outcome | AdmissionDecision]) -> None:
        for one in told:
            if stream := self._streams.get(one.session):
                stream.told.append(one)
                stream.news.set()

    def _end(self, session: str) -> None:
        self._grants.close(session)
        self._admission.end_session(session, time.monotonic())
        self._early = [early for early in self._early if early[0] != session]
        if stream := self._streams.pop(session, None):
            stream.ended = True
            stream.news.set()

    async def _expire(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            now, last, before = time.monotonic(), before, time.monotonic()
            if now - last > 2 * HEARTBEAT_S:
                continue  # it was this process that stood still: let the others be heard first
            for session in self._grants.expire(now):
                log.warning("session %s fell silent: its slots are free", session)
                self._end(session)
            for usage in self._grants.give_up(now):
                self._metering.give_up(usage)
            self._admission.forget(now, HEARTBEAT_S)
            self._metering.turn_month(month_of(time.time()))
            self._scale(now)
            self._grant()
            self._deliver(self._grants.positions())
            self._metrics.report(overview(self._admission, self._grants))

    def _scale(self, now: float) -> None:
        """Never raises: without this task nothing else would expire."""
        try:
            if now >= self._grants_from + REPLICA_LEASE_S:  # every replica could say that it lives
                for name, reason in self._scaling.decide(now).items():
                    log.info("%s: %s", name, reason)
            self._pool_metrics.report(self._scaling, self._grants, now)
        except Exception:  # whatever it is, what was wanted stays
            log.exception("autoscaling: no decision")

    # -- tenants and nodes ----------------------------------------------------------------------

    def _take_tenants(self) -> None:
        if self._tenants:
            self._admission.set_tenants(self._tenants.tenants)
            self._directory = self._tenants.directory
        for stream in self._streams.values():
            stream.directory = self._directory
            stream.news.set()

    async def _watch_tenants(self) -> None:
        while True:
            await asyncio.sleep(TENANTS_S)
            tenants = self._tenants
            if tenants is not None and await asyncio.to_thread(tenants.read):
                self._take_tenants()

    async def _place(self) -> None:
        """Learn which pools could be held, and refuse what waits for pools that cannot."""
        while True:
            try:
                nodes = list(await asyncio.to_thread(self._read_nodes))
            except Exception:  # whatever Ray says, the last known state serves until it answers
                log.warning("could not read the cluster's nodes; trying again", exc_info=True)
            else:
                self._warn(nodes)
                alive = {node.id for node in nodes}
                gone = {node for node in self._grants.draining if node not in alive}
                self._grants.draining = frozenset(
                    {node.id for node in nodes if node.draining} | gone
                )
                staying = [node for node in nodes if not node.draining]
                self._scaling.placeable = frozenset(
                    pool
                    for pool, need in self._pools.items()
                    if any(fits(need, node) for node in staying)
                )
                self._grants.set_placeable(filter(self._scaling.may_come, self._pools))
                self._deliver(self._grants.refuse())
            await asyncio.sleep(NODES_S)

    def _warn(self, nodes: Iterable[Node]) -> None:
        for node, warning in unknown_cards(nodes).items():
            if node not in self._warned:
                log.warning(warning)
                self._warned.add(node)
