"""The routes of jobs: accepted with 202, read, watched, cancelled."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..dispatch.client.attempts import Attempts
from ..dispatch.client.client_call import ClientCall
from ..dispatch.client.refusals import rate_limit_headers
from ..dispatch.client.session import DispatchSession
from ..dispatch.protocol import CallQuery, CallState
from ..errors import (
    Conflict,
    IdempotencyKeyReused,
    InvalidRequest,
    OctetError,
    RateLimited,
    Unavailable,
)
from ..jobs.acceptance import accept, check
from ..jobs.encoding import StoredPictures, StoredRequest, images_of
from ..jobs.endings import cancel
from ..jobs.job import OPEN, Job, NewJob
from ..jobs.job_images import JobImages
from ..jobs.queries import find_job, page, place_of
from ..request import StreamOptions
from ..store.schema import JOBS
from .edit_uploads import HeldPicture
from .idempotency import REPLAYED, REUSED, IdempotentRequest
from .image_urls import ImageUrls
from .ingress_metrics import IngressMetrics
from .job_events import JobWatch, job_events
from .job_requests import ASYNC, wants_job
from .route_context import RouteContext, json_answer, list_answer
from .timing import IngressTiming
from .wire.jobs import ENDPOINTS, JobItem, JobList, job_item
from .wire.pages import parse_page
from .wire.request import GenerationRequest, ignored_header
from .wire.response import ImagesResponse, images_response

MOST_STREAMS = 100  # of events, of one tenant at one Ingress
POLL_S = 2  # after which a client may look at its job again
ADMISSION_S = 30.0  # for the Dispatcher to decide whether a job may be accepted
STATES = ("queued", "running", "succeeded", "failed", "cancelled", "expired")


class JobRoutes:
    """Answers requests about jobs."""

    def __init__(
        self,
        context: RouteContext,
        session: DispatchSession,
        attempts: Attempts,
        urls: ImageUrls,
        images: JobImages,
        metrics: IngressMetrics,
        timing: IngressTiming,
    ) -> None:
        self._context, self._session, self._attempts = context, session, attempts
        self._urls, self._images, self._metrics, self._timing = urls, images, metrics, timing
        self._watch = JobWatch(context)
        self._streams: Counter[str] = Counter()  # of events, by tenant
        self.routes = [
            Route("/v1/jobs", self.list, methods=["GET"]),
            Route("/v1/jobs/{id}", self.read, methods=["GET"]),
            Route("/v1/jobs/{id}", self.cancel, methods=["DELETE"]),
            Route("/v1/jobs/{id}/events", self.events, methods=["GET"]),
        ]

    # -- acceptance -----------------------------------------------------------------------------

    async def accept(
        self,
        parsed: GenerationRequest,
        endpoint: str,
        request_id: str,
        http: Request,
        held: HeldPicture | None,
        asked: IdempotentRequest | None,
    ) -> Response:
        """Accept a job: 202 once it is stored. With an Idempotency-Key it is stored once.

        `endpoint`: the path of its request. `held`: the pixels of an edit, which are let go in any
        case. `asked`: its key, if it has one. Raises an `OctetError` for a job that is refused.
        """
        tenant: str = http.scope["tenant"]
        id = f"job_{asked.id(tenant) if asked else uuid.uuid4().hex}"
        digest = asked.digest if asked else ""
        try:
            there = await self._context.read(lambda connection: find_job(connection, id))
            if there:
                job = there
            else:
                job = await self._accepted(id, digest, parsed, endpoint, request_id, http, held)
            if job.digest != digest:
                raise IdempotencyKeyReused(REUSED)
        finally:
            if held:
                held.release()
        self._metrics.ended(endpoint, job.model, "accepted", 202)
        headers = {
            "location": f"/v1/jobs/{job.id}",
            "retry-after": str(POLL_S),
            **ignored_header(parsed.ignored),
            **({REPLAYED: "true"} if there else {}),
        }
        if wants_job(http):
            headers["preference-applied"] = ASYNC
        return json_answer(await self._item(job, http), 202, headers)

    async def _accepted(
        self,
        id: str,
        digest: str,
        parsed: GenerationRequest,
        endpoint: str,
        request_id: str,
        http: Request,
        held: HeldPicture | None,
    ) -> Job:
        parsed.check_stored()
        tenant, key_id = http.scope["tenant"], http.scope.get("key_id", "")
        options = StreamOptions()
        queued = [self._attempts.queued_image(image, options) for image in parsed.images]
        first = parsed.images[0]
        job = NewJob(
            id=id,
            tenant=tenant,
            lane="job",
            endpoint=ENDPOINTS[endpoint],
            model=first.model,
            precision=first.precision.value,
            work_s=round(sum(image.work_s for image in queued), 6),
            images=len(parsed.images),
            request="",
            digest=digest,
            request_id=request_id,
            key_id=key_id,
            created=0.0,
            expires=0.0,
        )
        client = ClientCall(ADMISSION_S)
        call = self._session.open(
            tenant,
            request_id,
            (),
            ADMISSION_S,
            client,
            key_id=key_id,
            call_id=f"{id}.{uuid.uuid4().hex[:8]}",  # by which the Dispatcher knows the job
            lane="acceptance",
            work_s=job.work_s,
        )
        try:
            await client.run(call.admitted())
            return await self._store(job, parsed, held)
        except OctetError as error:
            error.headers = {**rate_limit_headers(call.rate_limits), **error.headers}
            raise
        finally:
            call.close()

    async def _store(self, job: NewJob, parsed: GenerationRequest, held: HeldPicture | None) -> Job:
        """Store a job, after the pictures of an edit; these are deleted if it is refused."""
        most = self._context.live.jobs.max_queued
        pictures: StoredPictures | None = None
        if held and held.pixels:
            await self._context.write(lambda connection, now: check(connection, job, most, now))
            pictures = await self._images.put_pictures(job.tenant, held.pixels, job.request_id)
            held.release()
        request = StoredRequest(tuple(parsed.images), parsed.as_b64, pictures).as_json()

        def store(connection: Connection, now: float) -> Job:
            dated = job._replace(request=request, created=now, expires=now + parsed.timeout_s)
            return accept(connection, dated, most, now)

        try:
            stored = await self._context.write(store)
        except Unavailable:  # it may be stored
            raise
        except OctetError:
            await self._images.delete_soon(pictures or ())
            raise
        if stored.request != request:
            await self._images.delete_soon(pictures or ())
        return stored

    # -- reading --------------------------------------------------------------------------------

    async def read(self, http: Request) -> Response:
        """Answer `GET /v1/jobs/ID`."""
        return json_answer(await self._item(await self._job(http), http))

    async def list(self, http: Request) -> Response:
        """Answer `GET /v1/jobs`: the newest first; with `batch_id` the lines of a batch."""
        asked = parse_page(http.query_params, "status", "batch_id")
        only: dict[str, Any] = {"lane": "job"}
        if batch := asked.only.get("batch_id"):
            only = {"batch": batch}
        if state := asked.only.get("status"):
            if state not in STATES:
                raise InvalidRequest(
                    f"status '{state[:80]}' must be one of {', '.join(STATES)}", param="status"
                )
            only["state"] = state
        tenant = http.scope["tenant"]
        rows = await self._context.read(
            lambda connection: page(connection, JOBS, tenant, asked.after, asked.limit, **only)
        )
        jobs = [Job(*row) for row in rows[: asked.limit]]
        data = [job_item(job, self._links(job, http)) for job in jobs]
        return list_answer(JobList, data, has_more=len(rows) > asked.limit)

    async def events(self, http: Request) -> Response:
        """Answer `GET /v1/jobs/ID/events`: each change of the job, until it has ended."""
        job, tenant = await self._job(http), http.scope["tenant"]
        if self._streams[tenant] >= MOST_STREAMS:
            raise RateLimited(f"you watch {MOST_STREAMS} jobs already, which is the most")

        async def item(job: Job) -> JobItem:
            return await self._item(job, http, links=True)

        def ended() -> None:
            self._streams[tenant] -= 1
            self._streams += Counter()  # forgets those with none

        last = http.headers.get("last-event-id", "")
        self._streams[tenant] += 1
        return await job_events(self._watch, job, item, last, self._timing.keep_alive_s, ended)

    async def _job(self, http: Request) -> Job:
        """The tenant's job that the path names. Raises `NotFound` if there is none."""
        id, tenant = self._context.id(http), http.scope["tenant"]
        job = await self._context.read(lambda connection: find_job(connection, id, tenant))
        if job is None:
            raise self._context.not_found(http)
        return job

    async def _item(self, job: Job, http: Request, *, links: bool = False) -> JobItem:
        """Describe a job with its images; `links`: as links, whatever it has asked for."""
        if job.state in OPEN:
            return job_item(job, **await self._present(job))
        if job.result and StoredRequest.of(job.request).as_b64 and not links:
            return job_item(job, await self.images(job))
        return job_item(job, self._links(job, http))

    async def _present(self, job: Job) -> dict[str, Any]:
        """Return the place and the progress of a job that has not ended."""
        state = await self._call_state(job) if job.state == "running" else None
        if state is None:
            if job.state == "running":
                return {}
            place = await self._context.read(lambda connection: place_of(connection, job))
            return {"queue_position": place}
        if not state.running:
            return {"status": "queued", "queue_position": state.position}
        told = state.progress
        if told is None:
            return {}
        eta_s = None if told.eta_s is None else round(told.eta_s, 3)
        return {"progress": round(told.step / max(told.steps, 1), 4), "eta_s": eta_s}

    async def _call_state(self, job: Job, *, cancel: bool = False) -> CallState | None:
        """Ask the Dispatcher about the job's call; None if it does not know or does not answer."""
        query = CallQuery(job.tenant, job.call_id, cancel)
        try:
            async with asyncio.timeout(self._timing.dispatcher_s):
                answer = await self._session.ask(query)
        except TimeoutError:
            return None
        return answer.state if answer else None

    def _links(self, job: Job, http: Request) -> ImagesResponse | None:
        """The images of a job that has succeeded, as links."""
        if job.result is None:
            return None
        images = images_of(job.result)
        urls = [self._urls.url(image.name, http) for image in images]
        requests = StoredRequest.of(job.request).images
        results = [image.result() for image in images]
        return images_response(requests, results, urls, job.ended or 0.0)

    async def images(self, job: Job) -> ImagesResponse:
        """The images of a job that has succeeded, in base64.

        Raises `NotFound` if they are gone, and `StoreFailed` if they cannot be read.
        """
        images = images_of(job.result or "[]")
        files = [await self._urls.image(image.name) for image in images]
        results = [image.result(file) for image, file in zip(images, files, strict=True)]
        requests = StoredRequest.of(job.request).images
        return await asyncio.to_thread(images_response, requests, results, (), job.ended or 0.0)

    def answer_of(self, http: Request) -> Callable[[Job], Any]:
        """Returns what makes the answer of a line of a batch: its images, as it has asked for."""

        async def answer(job: Job) -> ImagesResponse | None:
            if job.result is None:
                return None
            if StoredRequest.of(job.request).as_b64:
                return await self.images(job)
            return self._links(job, http)

        return answer

    # -- cancelling -----------------------------------------------------------------------------

    async def cancel(self, http: Request) -> Response:
        """Answer `DELETE /v1/jobs/ID`: the job ends as cancelled, and its images stop."""
        job = await self._job(http)
        if job.batch:
            raise Conflict(f"the job is a line of {job.batch}: cancel the batch")
        cancelled = await self._context.write(lambda connection, now: cancel(connection, job, now))
        now = await self._job(http)
        if not cancelled and now.state != "cancelled":
            raise Conflict(f"the job has ended already: {now.state}")
        if cancelled and now.fence:
            await self._call_state(now, cancel=True)
        return json_answer(await self._item(now, http))
