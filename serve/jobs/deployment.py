"""The Jobs deployment: runs jobs and batches, and sends webhooks.

It opens calls at the Dispatcher as an Ingress does, and keeps a few of each tenant's jobs in the
Dispatcher's queue: enough that fairness is the queue's, few enough that requests find room there.
With PostgreSQL there may be several replicas; the database keeps them apart.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection

from cluster.ray_nodes import cluster_id

from ..dispatch.client.attempts import Attempts
from ..dispatch.client.live_models import LiveModels
from ..dispatch.client.session import DispatchSession
from ..dispatch.protocol import TIMING, Timing
from ..errors import KeyInvalid, OctetError
from ..models.model_files import Units
from ..request import ImageRequest, StreamOptions
from ..settings.application import FrontSettings, Settings
from ..store.database import Database
from ..store.link import DatabaseLink
from . import batch_rows, counts, queries, retention
from .batch_reader import BatchReader, ParsedRequest
from .claims import (
    FEW,
    JobClaim,
    claim,
    expire_waiting,
    give_back_unknown,
    renew,
    requeue_lost,
)
from .endings import cancel
from .job import Job, Kind, kind_of
from .job_images import JobImages
from .jobs_metrics import JobsMetrics
from .runner import JobRunner
from .timing import JOB_TIMING, JobTiming
from .webhook_rows import give_up_old
from .webhook_sender import WebhookSender

log = logging.getLogger("ray.serve")

T = TypeVar("T")

AHEAD = 2  # jobs of a kind in the Dispatcher's queue, for each slot that they may use
LEAST = 4  # of a kind, however few slots there are: without any, no replica would be started
QUEUE_SHARE = 4  # all jobs together take at most this part of the queue: 1 ÷ 4

# Parses a body in JSON with these settings; returns its images, and whether it asks for base64.
ParseImages = Callable[[bytes, Settings], tuple[tuple[ImageRequest, ...], bool]]


class Jobs:
    """Runs jobs, reads the files of batches and sends webhooks."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self,
        front: dict[str, Any],
        dispatcher: Any,
        pool_handle: Callable[[str], Any],
        units: Units,
        parse: ParseImages,
        timing: JobTiming = JOB_TIMING,
        dispatch_timing: Timing = TIMING,
        cluster: Callable[[], str] = cluster_id,
    ) -> None:
        """`front`: the fields of `FrontSettings`. `dispatcher`: the handle of the Dispatcher.

        `pool_handle`: returns the handle of a pool's Generators. `units`: returns the reference
        work of each model. `cluster`: returns an id that no other cluster has. The models come with
        `reconfigure`. Raises `OSError` if the data folder cannot be used.
        """
        settings = FrontSettings.model_validate(front)
        if settings.database is None:
            raise ValueError("jobs need a database")
        self._timing, self._parse = timing, parse
        self._keyed = settings.auth == "keys"
        self._owner = uuid.uuid4().hex
        self._metrics = JobsMetrics()
        self._database = DatabaseLink(settings.database)
        self._find_cluster, self._cluster = cluster, ""
        self._session = DispatchSession(dispatcher, dispatch_timing)
        self._attempts = Attempts(pool_handle, self._metrics, dispatch_timing)
        self._models = LiveModels(self._attempts, units)
        self._images = JobImages(settings)
        self._paused: dict[str, float] = {}  # tenants of which no job is claimed, and until when
        self._claiming = False
        self.runner = JobRunner(
            self._database,
            self._session,
            self._attempts,
            self._images,
            timing,
            self._lease_cluster,
            self._pause,
            self._metrics.ended,
        )
        self._reader = BatchReader(
            self._database, self._parsed, timing.lease_s, self._limits_of_batches
        )
        self._sender = WebhookSender(
            self._database, lambda: self.live.jobs.webhook_networks, self._metrics.sent
        )
        # Ray Serve awaits this at the end of a replica. As an attribute of the object, and not of
        # its class, it is nothing that Python calls by itself.
        setattr(self, "__del__", self.close)  # noqa: B010 - mypy knows no such attribute
        self._tasks = [
            asyncio.create_task(self._again(work, every_s))
            for work, every_s in (
                (self._claim, timing.poll_s),
                (self._renew, timing.renew_s),
                (self._look_after, timing.sweep_s),
                (self._read_batches, timing.sweep_s),
                (self._forget, timing.forget_s),
                (self._send, timing.poll_s),
            )
        ]

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply the models and the live settings of `user_config`, which are all settings.

        Ray Serve calls this before the first request and whenever the settings change.
        """
        settings = Settings.model_validate(user_config)
        await self._models.set(settings)

    @property
    def live(self) -> Settings:
        """The present settings."""
        return self._models.settings

    async def check_health(self) -> None:
        """Raise `RuntimeError` if a background task has ended; called by Ray Serve.

        This is also the time to look for weights that were not there.
        """
        self._session.check()
        if any(task.done() for task in self._tasks):
            raise RuntimeError("jobs are without their task")
        await self._models.look_again()

    async def close(self) -> None:
        """Give all jobs back, so that another process runs them at once.

        A process that dies without this loses its jobs when their leases end.
        """
        for task in self._tasks:
            task.cancel()
        try:
            async with asyncio.timeout(self._timing.renew_s):
                await self.runner.stop(self._owner)
                await self._sender.close()
        except (OSError, TimeoutError):
            log.warning("jobs could not be given back; their leases will end")
        await asyncio.to_thread(self._database.close)
        self._images.close()

    # -- what is done again and again -----------------------------------------------------------

    async def _again(self, work: Callable[[], Coroutine[Any, Any, None]], every_s: float) -> None:
        while True:
            pause_s = every_s
            try:
                if self._models.begun:
                    await work()
            except OSError as error:  # the database's, or the store's
                log.warning("jobs: %s; trying again", error)
                pause_s = max(every_s, self._timing.pause_s)
            except OctetError as error:
                log.warning("jobs: %s; trying again", error.__cause__ or error)
                pause_s = max(every_s, self._timing.pause_s)
            except Exception:  # a restart would meet the same again, and stop all jobs meanwhile
                log.exception("jobs: an unexpected error; trying again")
                pause_s = max(every_s, self._timing.pause_s)
            await asyncio.sleep(pause_s)

    async def _claim(self) -> None:
        """Claim jobs as long as the queue has room for them."""
        status, _ = self._session.status()
        if status is None or status.draining:
            return
        self._metrics.paused(full=self._images.full)
        if self._images.full:
            return
        slots = {pool: found.slots for pool, found in status.pools.items()}
        live = self.live
        most = live.max_queued // QUEUE_SHARE
        mine = Counter(self._group(kind_of(job), slots) for job in self.runner.running.values())
        room = {
            "all": most - mine.total(),
            "batch": max(most // 2, 1) - mine["batch"],
            "idle": max(most // 4, 1) - mine["idle"],
        }
        if room["all"] <= 0:
            return

        now = asyncio.get_running_loop().time()
        self._paused = {name: until for name, until in self._paused.items() if until > now}

        def window(kind: Kind) -> int:
            if kind.tenant in self._paused:
                return 0
            pools = self._pools(kind.model, kind.precision)
            if not pools:  # it may be served elsewhere, or again
                return 0
            every = usable = sum(slots.get(pool, 0) for pool in pools)
            if kind.lane == "batch":
                free = live.jobs.batch_free_slots
                usable = sum(max(slots.get(pool, 0) - free, 0) for pool in pools)
                if not usable and (every or not live.jobs.scale_up_for_batches):
                    return 0
            return max(AHEAD * usable, LEAST)

        def group(kind: Kind) -> str:
            return self._group(kind, slots)

        database, lease_s = await self._database.opened(), self._timing.lease_s

        def work(connection: Connection) -> tuple[list[Job], float]:
            now = database.now(connection)
            return claim(connection, self._owner, room, group, window, now + lease_s, now), now

        if not await self._database.read(counts.any_waiting):
            return
        self._claiming = True
        try:
            jobs, claimed_at = await self._database.write(work)
        finally:
            self._claiming = False
        for job in jobs:
            self.runner.start(job, claimed_at)
        self._metrics.claimed(len(jobs))

    def _group(self, kind: Kind, slots: Mapping[str, int]) -> str:
        """The group of a kind: "idle" without any slot, else its lane.

        Lines of batches, and jobs that no replica can run yet, get only a part of the queue each,
        so that they do not keep all others from it.
        """
        pools = self._pools(kind.model, kind.precision)
        return kind.lane if any(slots.get(pool) for pool in pools) else "idle"

    def _pause(self, tenant: str, seconds: float) -> None:
        """Claim no job of a tenant for a while, because it has reached its work rate."""
        self._paused[tenant] = asyncio.get_running_loop().time() + seconds

    def _pools(self, model: str, precision: str) -> tuple[str, ...]:
        for one in self.live.models:
            if one.id == model:
                return tuple(
                    one.pool_name(p) for p in one.pools if precision in ("auto", p.precision)
                )
        return ()

    async def _renew(self) -> None:
        """Renew the claims of all jobs that run here, and stop those that are lost or cancelled."""
        claims = {JobClaim(job.id, job.fence): job for job in self.runner.running.values()}
        if not claims:
            return
        database = await self._database.opened()

        def work(connection: Connection) -> dict[str, tuple[str, int]]:
            until = database.now(connection) + self._timing.lease_s
            return dict(renew(connection, claims.keys(), until))

        gone = await self._database.write(work)
        for (id, fence), job in claims.items():
            if id in gone and gone[id] == ("cancelled", fence):
                self.runner.cancel(job.call_id)
            elif id in gone and gone[id] != ("succeeded", fence):  # that is its own end
                self.runner.drop(job.call_id)

    async def _look_after(self) -> None:
        """Queue jobs again whose process died, end those that expired, cancel batches.

        The own claims are renewed before: after an outage of the database they are no lost ones.
        """
        await self._images.look()
        database = await self._database.opened()
        mine = [JobClaim(job.id, job.fence) for job in self.runner.running.values()]
        unknown = None if self._claiming else {claim.id for claim in mine}

        def requeue(connection: Connection) -> int:
            now = database.now(connection)
            if mine:
                renew(connection, mine, now + self._timing.lease_s)
            if unknown is not None:
                give_back_unknown(connection, self._owner, unknown, now)
            return requeue_lost(connection, now)

        self._metrics.lost(await self._database.write(requeue))
        for work, some in ((expire_waiting, FEW), (batch_rows.cancel_some, batch_rows.SOME)):
            while await self._database.write(partial(_at_present, database, work)) >= some:
                pass
        await self._database.write(partial(_at_present, database, _cancel_running))

    async def _read_batches(self) -> None:
        if self._keyed and self._session.tenants is None:
            return  # which models a tenant may use is not known yet
        while await self._reader.read_next():
            pass

    async def _forget(self) -> None:
        """Forget old jobs with their images, and old batches, files and messages."""
        database, keep_s = await self._database.opened(), self.live.jobs.keep_s

        def forget_jobs(connection: Connection, now: float) -> retention.Forgotten:
            return retention.forget_jobs(connection, now - keep_s)

        def forget_deliveries(connection: Connection, now: float) -> bool:
            return retention.forget_deliveries(connection, now - keep_s)

        while True:
            forgotten = await self._database.write(partial(_at_present, database, forget_jobs))
            if forgotten.names:
                await self._images.delete_soon(forgotten.names)
            if forgotten.jobs < retention.SOME:
                break
        for work in (retention.forget_file, forget_deliveries, give_up_old):
            while await self._database.write(partial(_at_present, database, work)):
                pass
        await self._database.write(counts.forget_empty)

    async def _send(self) -> None:
        await self._sender.send_due()

    # -- what the parts ask for -----------------------------------------------------------------

    async def _lease_cluster(self) -> str | None:
        """This cluster's id if other clusters share the budgets, else None."""
        if not (await self._database.opened()).is_shared:
            return None
        self._cluster = self._cluster or await asyncio.to_thread(self._find_cluster)
        return self._cluster

    def _limits_of_batches(self) -> tuple[int, int, int]:
        jobs = self.live.jobs
        return jobs.max_lines, self.live.max_body_bytes, jobs.max_queued

    def _parsed(self, body: bytes, tenant: str) -> ParsedRequest:
        """Parse a line's body for a tenant. Raises an `OctetError` if it cannot be served."""
        settings = self.live
        if self._keyed:
            access = self._session.tenants and self._session.tenants.get(tenant)
            if not access:
                raise KeyInvalid("the tenant of this batch may not call any more")
            if access.models is not None:
                allowed = tuple(m for m in settings.models if m.id in access.models)
                settings = settings.model_copy(update={"models": allowed})
        images, as_b64 = self._parse(body, settings)
        queued = [self._attempts.queued_image(image, StreamOptions()) for image in images]
        return ParsedRequest(images, as_b64, round(sum(image.work_s for image in queued), 6))


def _at_present(
    database: Database, work: Callable[[Connection, float], T], connection: Connection
) -> T:
    """Call `work` with the time by the database's clock."""
    return work(connection, database.now(connection))


def _cancel_running(connection: Connection, now: float) -> int:
    """End running lines whose batches are being cancelled; return their number."""
    ids = batch_rows.running_to_cancel(connection)
    for id in ids:
        if job := queries.find_job(connection, id):
            cancel(connection, job, now)
    return len(ids)
