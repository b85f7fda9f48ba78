"""Runs claimed jobs, each from its call at the Dispatcher to its end in the database.

What can go wrong, and what follows from it:

- The call is refused for now: the job is given back, and claimed again later.
- The image cannot be stored: tried again until it is, while the claim is renewed.
- The database does not answer when the job is to end: tried again until it does.
- The claim is lost meanwhile: the images are dropped, and nothing is charged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from ..dispatch.client.attempts import Attempts
from ..dispatch.client.client_call import ClientCall
from ..dispatch.client.quarantine import QUARANTINED, request_digest
from ..dispatch.client.session import DispatchSession
from ..dispatch.protocol import CallProgress, QuarantinedRequest
from ..errors import (
    DeadlineExceeded,
    OctetError,
    QuotaExceeded,
    RateLimited,
    ReplicaFailed,
    RequestCancelled,
    Unavailable,
)
from ..request import OnProgress, PartialImage, Progress, StreamOptions
from ..store.link import DatabaseLink
from ..usage.record import UsageRecord
from .acceptance import may_be_paid
from .claims import JobClaim, give_back, give_back_unknown
from .encoding import StoredError, StoredImage, StoredRequest, images_as_json
from .endings import Ending, end
from .job import Job
from .job_images import JobImages
from .queries import find_job
from .timing import JobTiming

log = logging.getLogger("ray.serve")

T = TypeVar("T")


class JobCall(ClientCall):
    """The call of a job. Nobody waits for it, so it is unwanted only if its tenant cancels it."""

    @property
    def unwanted(self) -> bool:
        return self.cancelled


class JobRunner:
    """Runs jobs; `running`: those whose claims are to be renewed, by the ids of their calls."""

    def __init__(
        self,
        database: DatabaseLink,
        session: DispatchSession,
        attempts: Attempts,
        images: JobImages,
        timing: JobTiming,
        cluster: Callable[[], Awaitable[str | None]],
        on_rate_limit: Callable[[str, float], None] = lambda _tenant, _seconds: None,
        on_end: Callable[[Job, str], None] = lambda _job, _how: None,
    ) -> None:
        """`cluster`: returns from whose leases charges are taken; None: no other cluster shares
        the budgets. `on_rate_limit` is called with a tenant that has reached its work rate, and for
        how many seconds. `on_end` is called with each job and how its run has ended here: its
        state, or "given_back", or "fenced" if the claim was lost.
        """
        self._database, self._session, self._attempts = database, session, attempts
        self._images, self._timing, self._cluster = images, timing, cluster
        self._on_rate_limit, self._on_end = on_rate_limit, on_end
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._calls: dict[str, JobCall] = {}
        self.running: dict[str, Job] = {}
        self._stopping = False

    def start(self, job: Job, now: float) -> None:
        """Run a claimed job in the background; `now`: by the database's clock."""
        call = JobCall(max(job.expires - now, 0.0))
        self.running[job.call_id], self._calls[job.call_id] = job, call
        self._tasks[job.call_id] = task = asyncio.create_task(self._run(job, call))
        task.add_done_callback(lambda _: self._forget(job))

    def cancel(self, call_id: str) -> None:
        """Stop a job that its tenant has cancelled; the steps that were done are charged."""
        if call := self._calls.get(call_id):
            call.cancel()

    def drop(self, call_id: str) -> None:
        """Stop a job whose claim is lost; nothing is charged."""
        if task := self._tasks.get(call_id):
            task.cancel()

    async def stop(self, owner: str) -> None:
        """Stop all jobs, and give back all that `owner`, this process, has claimed."""
        self._stopping = True
        for call_id in list(self._tasks):
            self.drop(call_id)
        now = (await self._database.opened()).now
        await self._database.write(
            lambda connection: give_back_unknown(connection, owner, (), now(connection))
        )

    def _forget(self, job: Job) -> None:
        for known in (self.running, self._calls, self._tasks):
            known.pop(job.call_id, None)

    async def _run(self, job: Job, client: JobCall) -> None:
        how = "fenced"
        try:
            how = await self._to_its_end(job, client)
        except asyncio.CancelledError:
            how = "given_back" if self._stopping else "fenced"
            raise
        except Exception:  # of the job or of this program: after some attempts the job fails
            log.exception("%s: an unexpected error", job.id)
            how = await self._give_back(job, self._timing.retry_s, lost=True)
        finally:
            self._on_end(job, how)

    async def _to_its_end(self, job: Job, client: JobCall) -> str:
        """Run a job; return how that ended."""
        try:
            return await self._generate(job, StoredRequest.of(job.request), client)
        except RequestCancelled:
            return await self._end(Ending(job.id, job.fence, "cancelled"))
        except DeadlineExceeded:
            return await self._end(Ending(job.id, job.fence, "expired"))
        except QuotaExceeded as error:
            if not await self._may_be_paid(job):
                return await self._fail(job, error)
            return await self._give_back(job, self._timing.retry_s, lost=False)
        except (Unavailable, RateLimited) as error:
            if not error.retryable and not isinstance(error, RateLimited):
                return await self._fail(job, error)
            pause_s = _pause_s(error, self._timing.retry_s)
            if isinstance(error, RateLimited):
                self._on_rate_limit(job.tenant, pause_s)
            return await self._give_back(job, pause_s, lost=False)
        except OctetError as error:
            if type(error) is OctetError:  # nobody foresaw it
                raise
            return await self._fail(job, error)

    async def _generate(self, job: Job, stored: StoredRequest, client: JobCall) -> str:
        images, session = stored.images, self._session
        pictures = stored.pictures
        edited = partial(self._images.pictures, pictures) if pictures else None
        if request_digest(job.tenant, images) in session.quarantined:
            raise ReplicaFailed(QUARANTINED)
        options = StreamOptions(progress=job.lane == "job")
        queued = [self._attempts.queued_image(image, StreamOptions()) for image in images]
        call = session.open(
            job.tenant,
            job.call_id,
            queued,
            max(job.expires - job.created, 1.0),
            client,
            key_id=job.key_id,
            call_id=job.call_id,
            lane=job.lane,
        )
        told = _ToldProgress(session, job.call_id, sum(image.steps for image in images))

        async def generate(index: int) -> tuple[StoredImage, UsageRecord]:
            image = images[index]
            result, usage = await self._attempts.generate(
                image, call, index, options, told.of(index), edited
            )
            name = await self._images.put(
                job.tenant, image.output_format, result.image, job.request_id
            )
            return StoredImage.of(name, result), usage

        async def all_images() -> list[tuple[StoredImage, UsageRecord]]:
            await call.admitted()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(generate(index)) for index in range(len(images))]
            return [task.result() for task in tasks]

        try:
            made = await client.run(_first_error(all_images()))
            result = images_as_json(tuple(image for image, _ in made))
            usages = [usage._replace(call=job.call_id) for _, usage in made]
            how = await self._end(Ending(job.id, job.fence, "succeeded", result, usages=usages))
            self.running.pop(job.call_id, None)
            if how == "succeeded":
                await call.count(usages)
                return how
            await self._images.delete_soon([image.name for image, _ in made])
            if await self._was_cancelled(job):  # a moment before it would have succeeded
                client.cancel()
                return "cancelled"
            return how
        except ReplicaFailed:
            id = request_digest(job.tenant, images)
            session.quarantine(QuarantinedRequest(id, job.tenant, job.call_id))
            raise
        finally:
            if not client.unwanted:
                call.generated.clear()  # they are charged when the job ends, or never
            call.close()

    async def _may_be_paid(self, job: Job) -> bool:
        """Return whether the budget would hold a job whose call was refused for it.

        Other work may be reserved in the budget now, and be given back later.
        """

        async def read() -> bool:
            database = await self._database.opened()
            return await self._database.read(
                lambda connection: may_be_paid(connection, job, database.now(connection))
            )

        return await self._until_written(read)

    async def _was_cancelled(self, job: Job) -> bool:
        """Return whether the tenant has cancelled this claim of a job."""

        async def read() -> bool:
            there = await self._database.read(lambda connection: find_job(connection, job.id))
            return bool(there and there.state == "cancelled" and there.fence == job.fence)

        return await self._until_written(read)

    async def _fail(self, job: Job, error: OctetError) -> str:
        text = StoredError.of(error).as_json()
        return await self._end(Ending(job.id, job.fence, "failed", error=text))

    async def _end(self, ending: Ending) -> str:
        """End a job in the database, however long that takes; return how it has ended."""
        cluster = await self._cluster()

        async def write() -> bool:
            now = (await self._database.opened()).now
            return await self._database.write(
                lambda connection: end(connection, ending, now(connection), cluster)
            )

        return ending.state if await self._until_written(write) else "fenced"

    async def _give_back(self, job: Job, pause_s: float, *, lost: bool) -> str:
        async def write() -> None:
            database = await self._database.opened()

            def work(connection: Any) -> None:
                now = database.now(connection)
                claims = [JobClaim(job.id, job.fence)]
                give_back(connection, claims, now + pause_s, now, lost=lost)

            await self._database.write(work)

        await self._until_written(write)
        return "given_back"

    async def _until_written(self, write: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await write()
            except OSError as error:
                log.warning("a job cannot be ended: %s; trying again", error)
                await asyncio.sleep(self._timing.pause_s)


class _ToldProgress:
    """Tells the Dispatcher how many steps of a job's images are done."""

    def __init__(self, session: DispatchSession, call_id: str, steps: int) -> None:
        self._session, self._call_id, self._steps = session, call_id, steps
        self._done: dict[int, int] = {}

    def of(self, index: int) -> OnProgress:
        """Return a function that takes the progress of image `index`."""

        def told(progress: Progress | PartialImage) -> None:
            if isinstance(progress, Progress):
                self._done[index] = progress.step
                done = sum(self._done.values())
                self._session.tell_progress(
                    CallProgress(self._call_id, done, self._steps, progress.eta_s)
                )

        return told


async def _first_error(work: Awaitable[T]) -> T:
    """Await a group of tasks; of their errors, raise the first one by itself."""
    try:
        return await work
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _pause_s(error: OctetError, least_s: float) -> float:
    """Seconds after which a call that was refused may be tried again."""
    asked = error.headers.get("retry-after", "")
    return max(float(asked) if asked.isdecimal() else 0.0, least_s)
