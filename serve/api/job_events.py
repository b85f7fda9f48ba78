"""The events of a job, as server-sent events that a client can take up again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

from starlette.responses import Response

from ..jobs.job import OPEN, Job
from ..jobs.queries import find_jobs
from .route_context import RouteContext
from .wire.event_stream import EventStream
from .wire.jobs import JobItem

POLL_S = 0.5  # between two looks at the jobs that are watched
PROGRESS_S = 1.0  # between two looks at the progress of one that runs
PLACE_S = 5.0  # between two looks at the place of one that waits


class JobWatch:
    """Looks at the jobs that clients watch, all of them at a time."""

    def __init__(self, context: RouteContext) -> None:
        self._context = context
        self._asked: dict[str, asyncio.Future[Job | None]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def next(self, id: str) -> Job | None:
        """The job at the next look; None if it is no longer kept.

        Raises `Unavailable` if the database does not answer.
        """
        if id not in self._asked:
            self._asked[id] = asyncio.get_running_loop().create_future()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._asked[id])

    async def _look(self) -> None:
        while self._asked:
            await asyncio.sleep(POLL_S)
            asked, self._asked = self._asked, {}
            try:
                found = await self._context.read(partial(find_jobs, ids=list(asked)))
            except Exception as error:
                for future in asked.values():
                    future.set_exception(error)
                    future.exception()  # so that asyncio does not report it if nobody waits
                continue
            jobs = {job.id: job for job in found}
            for id, future in asked.items():
                future.set_result(jobs.get(id))


async def job_events(
    watch: JobWatch,
    job: Job,
    item: Callable[[Job], Awaitable[JobItem]],
    last_id: str,
    keep_alive_s: float,
    ended: Callable[[], None],
) -> Response:
    """Stream an event for each change of a job, until it has ended.

    `item`: describes the job. `last_id`: the id of the last event that the client has; the same
    event is not sent again. A client that has the last event of all gets 204, so that it does not
    come back. `ended` is called when the stream has ended, or if there is none.
    """
    try:
        first = await item(job)
        if job.state not in OPEN and last_id == _id(job, first):
            ended()
            return Response(status_code=204)
        frames = _frames(watch, job, first, item, last_id, keep_alive_s)
        return EventStream(await anext(frames), frames, {}, ended)
    except BaseException:
        ended()
        raise


async def _frames(
    watch: JobWatch,
    job: Job,
    shown: JobItem,
    item: Callable[[Job], Awaitable[JobItem]],
    last_id: str,
    keep_alive_s: float,
) -> AsyncGenerator[bytes, None]:
    yield b": the events of a job\n\n"
    loop = asyncio.get_running_loop()
    sent_at = described_at = loop.time()
    present: Job | None = job
    while present:
        if (id := _id(present, shown)) != last_id:
            data = shown.model_dump_json()
            yield f"id: {id}\nevent: job.{shown.status}\ndata: {data}\n\n".encode()
            last_id, sent_at = id, loop.time()
        elif loop.time() - sent_at >= keep_alive_s:
            yield b": still here\n\n"
            sent_at = loop.time()
        if present.state not in OPEN:
            return
        described, present = present, await watch.next(job.id)
        every_s = PLACE_S if shown.status == "queued" else PROGRESS_S
        if present and (present != described or loop.time() - described_at >= every_s):
            shown, described_at = await item(present), loop.time()


def _id(job: Job, shown: JobItem) -> str:
    """The id of an event: it changes with everything that is worth an event."""
    facts = (job.fence, shown.status, shown.queue_position, shown.progress)
    return "-".join("" if fact is None else json.dumps(fact).strip('"') for fact in facts)
