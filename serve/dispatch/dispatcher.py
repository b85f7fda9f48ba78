"""The Dispatcher deployment: the one owner of the queue, exactly one replica, no GPU.

It is `Admission` and `Grants` with a clock, a network and two folders. Each Ingress opens a stream
on which verdicts and outcomes arrive in batches, and tells its news in batches; each Generator
reports itself. Tenants are read again when their files change, and usage is written by one thread,
as many records at a time as have come together.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.placement import Need, Node, fits, unknown_cards
from cluster.ray_nodes import living_nodes

from ..settings import Live, SettingsError
from ..tenants import directory, read_keys, read_tenants, stamps
from .admission import Admission
from .grants import Grants
from .messages import (
    Directory,
    Heartbeat,
    Lease,
    News,
    Opening,
    Outcome,
    Running,
    Stopped,
    Submission,
    Usage,
    Verdict,
)
from .metrics import TenantMetrics
from .overview import overview
from .usage import UsageLedger, month_end, month_of

log = logging.getLogger("ray.serve")

SESSION_LEASE_S = 10.0
REPLICA_LEASE_S = 5.0
HEARTBEAT_S = 1.0  # how often Ingresses and Generators are heard from
NODES_S = 2.0  # how often the cluster's nodes are looked up
TENANTS_S = 1.0  # how often the tenants' files are looked at
RECOVERY_S = 2.0  # after a restart nothing is granted until every Ingress could say what runs

Told = list[Outcome | Verdict] | Directory


class _Stream:
    """What one session has still to be told."""

    def __init__(self, directory: Directory) -> None:
        self.directory: Directory | None = directory
        self.told: list[Outcome | Verdict] = []
        self.news = asyncio.Event()
        self.news.set()
        self.ended = False


class Dispatcher:
    """See `serve.dispatch.session` for the other end of `session` and `tell`."""

    def __init__(
        self,
        pools: Mapping[str, Need],
        tenants_folder: str | None = None,
        usage_folder: str | None = None,
        read_nodes: Callable[[], Iterable[Node]] = living_nodes,
        recovery_s: float = RECOVERY_S,
    ) -> None:
        """`pools` and what one replica of each needs; `read_nodes` may block.

        Without `tenants_folder` there are no tenants to know, without `usage_folder` usage is
        counted until this process ends. Raises `SettingsError`, `OSError` and `ValueError` for
        what these folders hold.
        """
        self._pools, self._read_nodes = pools, read_nodes
        self._grants = Grants(
            list(pools), session_lease_s=SESSION_LEASE_S, replica_lease_s=REPLICA_LEASE_S
        )
        self._admission = Admission(self._grants, max_queued=Live().max_queued)
        self._grants_from = time.monotonic() + recovery_s
        self._streams: dict[str, _Stream] = {}
        self._warned: set[str] = set()
        self._tenants_folder = Path(tenants_folder).expanduser() if tenants_folder else None
        self._stamps: Any = None
        self._directory: Directory = {}
        if self._tenants_folder:
            self._stamps = stamps(self._tenants_folder)
            self._take_tenants(*_read(self._tenants_folder))
        self._ledger = (
            UsageLedger(Path(usage_folder).expanduser(), time.time()) if usage_folder else None
        )
        self._begin_month(dict(self._ledger.spent) if self._ledger else {})
        self._usages: asyncio.Queue[tuple[str, Usage]] = asyncio.Queue()
        self._metrics = TenantMetrics()
        self._tasks = [
            asyncio.create_task(task())
            for task in (self._expire, self._place, self._watch_tenants, self._write_usages)
        ]

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve with `max_queued`, at the start and when it changes."""
        self._admission.max_queued = user_config["max_queued"]

    # -- Ingresses ------------------------------------------------------------------------------

    async def session(
        self, session: str, calls: list[Opening], running: list[Running]
    ) -> AsyncIterator[Told]:
        """What becomes of the calls of one Ingress, from those that it has open and runs.

        Opening a session again replaces it. Ends when it expires or is replaced. The directory of
        tenants comes first, and again whenever it changes.
        """
        self._end(session)
        stream = self._streams[session] = _Stream(self._directory)
        self._grants.open(session, time.monotonic())
        tenants = {call.call: call.tenant for call in calls}
        for entry in running:
            self._grants.declare(session, entry, tenants[entry.call])
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

    async def tell(self, session: str, news: News) -> bool:
        """What happened at one Ingress since it last spoke. False if its session is not open."""
        now = time.monotonic()
        if not self._grants.heard_from(session, now):
            return False
        for usage in news.usages:
            self._usages.put_nowait((session, usage))
        for release in news.releases:
            stopped = self._grants.release(session, release, now)
            if release.cancelled:
                self._admission.reserve(release.cancelled.tenant, release.cancelled.work_s)
                if stopped:
                    self._charge_cancelled(release.cancelled, stopped)
        for call in news.ended:
            self._admission.end(session, call)
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
        self, said: Heartbeat, drawing: Iterable[Lease] = (), stopped: Iterable[Stopped] = ()
    ) -> list[Lease]:
        """The heartbeat of a Generator replica; returns the leases that no session holds."""
        now = time.monotonic()
        self._grants.report_replica(said, now)
        for one in stopped:
            if usage := self._grants.stopped(one, now):
                self._charge_cancelled(usage, one)
        self._grant()
        return [lease for lease in drawing if not self._grants.holds(lease)]

    # -- those who operate it -------------------------------------------------------------------

    async def state(self) -> dict[str, Any]:
        """Open `calls` of clients, `queued` images, and of each pool what its replicas say.

        `running`: images granted to the pool; `speed`: reference replicas that it amounts to.
        """
        pools = {}
        for pool in self._pools:
            replicas = self._grants.replicas(pool)
            pools[pool] = {
                "replicas": len(replicas),
                "slots": self._grants.slots(pool),
                "running": self._grants.running_in(pool),
                "running_work_s": round(sum(said.running_work_s for said in replicas), 3),
                "speed": round(sum(said.speed for said in replicas), 3),
                "placeable": self._grants.placeable(pool),
            }
        return {
            "draining": self._admission.draining,
            "calls": self._admission.open_calls,
            "queued": self._grants.queue_depth,
            "pools": pools,
        }

    async def overview(self) -> dict[str, Any]:
        """`state`, and what each tenant has under way and has used: for `octet top`."""
        return {**await self.state(), "tenants": overview(self._admission, self._grants)}

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

    def _open_calls(self, session: str, openings: Iterable[Opening]) -> None:
        now = time.monotonic()
        entries: list[Submission] = []
        for opening in openings:
            verdict = self._admission.open(session, opening, now)
            if verdict.refusal:
                self._metrics.refused(opening.tenant, verdict.refusal)
            if not opening.accepted:
                self._deliver([verdict])
            if not verdict.refusal:
                self._submit(session, opening.entries, grant=False)
                entries += opening.entries
        self._grant()
        self._tell_positions(entries)

    def _submit(self, session: str, entries: Iterable[Submission], grant: bool = True) -> None:
        for entry in entries:
            if call := self._admission.call(session, entry.call):
                refused = self._grants.submit(session, entry, call.tenant)
            else:
                refused = Outcome(session, entry.entry, None, "no_capacity")
            if refused:
                self._deliver([refused])
        if grant:
            self._grant()
            self._tell_positions(entries)

    def _tell_positions(self, entries: Iterable[Submission]) -> None:
        if any(entry.watched for entry in entries):
            self._deliver(self._grants.positions())

    def _grant(self) -> None:
        if time.monotonic() >= self._grants_from:
            self._deliver(self._grants.grant())

    def _deliver(self, told: Iterable[Outcome | Verdict]) -> None:
        for one in told:
            if stream := self._streams.get(one.session):
                stream.told.append(one)
                stream.news.set()

    def _end(self, session: str) -> None:
        self._grants.close(session)
        self._admission.end_session(session)
        if stream := self._streams.pop(session, None):
            stream.ended = True
            stream.news.set()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            now = time.monotonic()
            for session in self._grants.expire(now):
                log.warning("session %s fell silent: its slots are free", session)
                self._end(session)
            for usage in self._grants.give_up(now):
                self._admission.reserve(usage.tenant, -usage.work_s)
            self._admission.forget(now)
            if month_of(time.time()) != self._month:
                self._begin_month({})
            self._grant()
            self._deliver(self._grants.positions())
            self._metrics.report(overview(self._admission, self._grants))

    # -- usage ----------------------------------------------------------------------------------

    def _begin_month(self, spent: Mapping[str, float]) -> None:
        now = time.time()
        self._month = month_of(now)
        self._admission.begin_month(spent, time.monotonic() + month_end(now) - now)

    def _charge_cancelled(self, usage: Usage, stopped: Stopped) -> None:
        """The steps that were done of an image that its client did not want to the end."""
        self._admission.reserve(usage.tenant, -usage.work_s)
        if stopped.steps:
            part = stopped.steps / usage.steps
            done = usage._replace(
                steps=stopped.steps, work_s=usage.work_s * part, outcome="cancelled"
            )
            self._usages.put_nowait((stopped.lease.session, done))

    async def _write_usages(self) -> None:
        """Confirm what is on disk. What could not be written is not confirmed, but refused."""
        while True:
            batch = [await self._usages.get()]
            while not self._usages.empty():
                batch.append(self._usages.get_nowait())
            usages = [usage for _, usage in batch]
            kind: Any = "recorded"
            fresh: Iterable[Usage] = usages
            if self._ledger:
                try:
                    fresh = await asyncio.to_thread(self._ledger.append, usages, time.time())
                except OSError:
                    log.error("usage cannot be written: images are not delivered", exc_info=True)
                    kind, fresh = "unrecorded", ()
            now, new = time.monotonic(), set(fresh)
            for session, usage in batch:
                if usage in new:
                    new.discard(usage)
                    self._admission.spend(session, usage, now)
                    self._metrics.charged(usage)
            told = {(session, usage.call) for session, usage in batch}
            self._deliver([Outcome(session, call, None, kind) for session, call in told])

    # -- tenants and nodes ----------------------------------------------------------------------

    def _take_tenants(self, tenants: Any, known: Directory) -> None:
        self._admission.set_tenants(tenants)
        self._directory = known
        for stream in self._streams.values():
            stream.directory = known
            stream.news.set()

    async def _watch_tenants(self) -> None:
        while True:
            await asyncio.sleep(TENANTS_S)
            if (folder := self._tenants_folder) is None:
                continue
            found = await asyncio.to_thread(stamps, folder)
            if found == self._stamps:
                continue
            self._stamps = found
            try:
                self._take_tenants(*await asyncio.to_thread(_read, folder))
                log.info("tenants read again: %d", len(self._directory))
            except SettingsError as error:
                log.error("tenants stay as they were: %s", error)

    async def _place(self) -> None:
        """Learn which pools could be held, and refuse what waits for pools that cannot."""
        while True:
            try:
                nodes = list(await asyncio.to_thread(self._read_nodes))
            except Exception:  # whatever Ray says, the last known state serves until it answers
                log.warning("could not read the cluster's nodes; trying again", exc_info=True)
            else:
                self._warn(nodes)
                self._grants.set_placeable(
                    pool
                    for pool, need in self._pools.items()
                    if any(fits(need, node) for node in nodes)
                )
                self._deliver(self._grants.refuse())
            await asyncio.sleep(NODES_S)

    def _warn(self, nodes: Iterable[Node]) -> None:
        for node, warning in unknown_cards(nodes).items():
            if node not in self._warned:
                log.warning(warning)
                self._warned.add(node)


def _read(folder: Path) -> tuple[Any, Directory]:
    """Raises `SettingsError`."""
    tenants = read_tenants(folder)
    return tenants, directory(tenants, read_keys(folder))
