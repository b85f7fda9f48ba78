"""Answers to requests for images, from the parsed request to the bytes of the response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..dispatch.client.attempts import Attempts
from ..dispatch.client.client_call import ClientCall
from ..dispatch.client.open_call import CallClient, OpenCall
from ..dispatch.client.quarantine import QUARANTINED, request_digest
from ..dispatch.client.refusals import rate_limit_headers
from ..dispatch.client.session import DispatchSession
from ..dispatch.protocol import QuarantinedRequest, QueuedImage
from ..errors import ReplicaFailed
from ..request import ImageRequest, ImageResult, OnProgress, Precision
from ..results.cache.memory import CachedImages
from ..usage.record import UsageRecord
from .edit_uploads import HeldPicture
from .image_urls import ImageUrls
from .ingress_metrics import IngressMetrics
from .request_log import OK, RequestLogEntry, log_request, outcome_of
from .result_reuse import ResultReuse
from .single_flight import SharedGeneration
from .wire.event_stream import EventStream, Frames, events
from .wire.request import GenerationRequest, ignored_header
from .wire.response import response

LARGE_IMAGES = 2**16  # bytes; an answer with more of them is made in a thread
CacheUse = Literal["hit", "miss", "shared", "off"]


class JsonAnswer(Response):
    """A JSON response that calls `sent` once it was sent or the client has disconnected."""

    media_type = "application/json"

    def __init__(self, body: bytes, headers: dict[str, str], sent: Callable[[], None]) -> None:
        super().__init__(body, headers=headers)
        self._sent = sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._sent()

    def close(self) -> None:
        """Call `sent` for a response that is not going to be sent."""
        self._sent()


@dataclass(slots=True)
class _OpenRequest:
    """A client's request while it is being answered.

    `cleanup`: what must be done once the answer has been sent. `cache_key`: None if the result
    cache is not used. `cache_use`: what the result cache did, for header and metrics. `held`: an
    edit's picture and mask; None if they are not needed any more. `call_id`: the id that the call
    at the Dispatcher must have, if any.
    """

    parsed: GenerationRequest
    tenant: str
    request_id: str
    http: Request
    client: ClientCall
    cleanup: ExitStack
    held: HeldPicture | None = None
    call_id: str = ""
    queued: Sequence[QueuedImage] = ()
    cache_key: str | None = None
    cache_use: CacheUse = "off"
    error: BaseException | None = None  # the error with which the request ended
    results: Sequence[ImageResult] = ()

    @property
    def key_id(self) -> str:
        """The id of the client's API key; empty on a server without keys."""
        key: str = self.http.scope.get("key_id", "")
        return key

    def release(self) -> None:
        """Let go of an edit's picture and mask."""
        if self.held:
            self.held.release()
            self.held = None


class GenerationHandler:
    """Handles requests for images, new or edited, after authentication and parsing."""

    def __init__(
        self,
        session: DispatchSession,
        attempts: Attempts,
        urls: ImageUrls,
        reuse: ResultReuse,
        metrics: IngressMetrics,
        keep_alive_s: float,
        on_generated: Callable[[ImageRequest, ImageResult], None],
    ) -> None:
        """`keep_alive_s`: after how long without an event a stream sends a comment, in seconds.

        `on_generated` is called with each image that was generated here and is charged.
        """
        self.session, self._attempts = session, attempts
        self._keep_alive_s, self._on_generated = keep_alive_s, on_generated
        self._urls, self.reuse, self._metrics = urls, reuse, metrics
        self._tasks: set[asyncio.Task[None]] = set()  # tasks that nobody awaits

    async def answer(
        self,
        parsed: GenerationRequest,
        tenant: str,
        request_id: str,
        http: Request,
        held: HeldPicture | None = None,
        call_id: str = "",
    ) -> Response:
        """Answer a request from the result cache, or with generated images.

        `held`: an edit's picture and mask, which are let go in any case. `call_id`: the id that the
        call must have; empty if it may have any. Raises an `OctetError` for
        a request that is refused, cancelled or late, or that fails.
        """
        age_s = held.age_s if held else 0.0
        client = ClientCall(parsed.timeout_s, shortened=parsed.shortened, age_s=age_s)
        with ExitStack() as cleanup:
            request = _OpenRequest(parsed, tenant, request_id, http, client, cleanup, held, call_id)
            cleanup.callback(request.release)
            cleanup.enter_context(self._counted(request))
            cleanup.enter_context(self._quarantining(request))
            if parsed.as_url:
                self._urls.admit()
            request.queued = [self._attempts.queued_image(i, parsed.options) for i in parsed.images]
            request.cache_key = key = self.reuse.key(parsed, tenant, http.headers)
            if key and (found := await client.run(self.reuse.find(key, tenant))):
                return await self._from_cache(request, found)
            if parsed.stream:
                return await self._streamed(request)
            return await self._generated(request)

    @contextmanager
    def _quarantining(self, request: _OpenRequest) -> Iterator[None]:
        """Have equal requests refused for a while if this one kills replicas in the block.

        Raises `ReplicaFailed` if an earlier request did so.
        """
        tenant, images = request.tenant, request.parsed.images
        quarantined = self.session.quarantined
        if quarantined and request_digest(tenant, images) in quarantined:
            raise ReplicaFailed(QUARANTINED)
        try:
            yield
        except ReplicaFailed as error:
            request.error = error
            raise
        finally:
            if isinstance(request.error, ReplicaFailed):
                id = request_digest(tenant, images)
                self.session.quarantine(QuarantinedRequest(id, tenant, request.request_id))

    @contextmanager
    def _counted(self, request: _OpenRequest) -> Iterator[None]:
        """Count and log the request when the block ends, which is when its answer was sent."""
        model, path = request.parsed.images[0].model, request.http.url.path
        began = time.monotonic()
        try:
            yield
        except BaseException as error:
            request.error = error
            raise
        finally:
            took_s = time.monotonic() - began
            outcome = OK
            if request.error:
                outcome = outcome_of(request.error)
                self._metrics.ended(path, model, *outcome)
            else:
                self._metrics.answered(path, model, request.cache_use, took_s)
            log_request(
                RequestLogEntry(
                    request=request.parsed,
                    tenant=request.tenant,
                    request_id=request.request_id,
                    cache=request.cache_use,
                    results=request.results,
                    outcome=outcome,
                    took_s=took_s,
                )
            )

    # -- images from the result cache -----------------------------------------------------------

    async def _from_cache(self, request: _OpenRequest, found: CachedImages) -> Response:
        request.release()
        parsed = request.parsed
        usages = _free_usages(request, found.results, "hit")
        to_store = parsed.as_url and not found.names  # which may fail, and nothing is recorded then
        call = await self._admitted_without_work(request, () if to_store else usages)

        async def body() -> bytes:
            names = await self.store(request, found.results) if to_store else found.names
            return await self._body(request, found.results, names)

        content = b"" if parsed.stream else await request.client.run(body())
        await (call.record(usages) if to_store else call.recorded())
        if not parsed.stream:
            return self._json_answer(request, call, "hit", content)
        frames = events(parsed.images[0], lambda _: _at_once(found.results[0]), self._keep_alive_s)
        return self._event_stream(request, call, "hit", await anext(frames), frames)

    # -- generated images -----------------------------------------------------------------------

    async def _generated(self, request: _OpenRequest) -> Response:
        """Answer with new images, or with those of an equal request that is open already."""
        client = request.client
        reused: Literal["hit", "shared"] | None = None
        shared = await self._join(request)
        if shared:
            request.release()
            reused = "hit" if shared.finished else "shared"
            call = await self._admitted_without_work(request)
        else:
            shared = self._begin(request)
            await client.run(shared.admitted())

        async def body(shared: SharedGeneration) -> tuple[bytes, CachedImages]:
            results = await shared.images()
            names = await shared.names() if request.parsed.as_url else []
            found = CachedImages(tuple(results), tuple(names))
            return await self._body(request, results, names), found

        content, found = await client.run(body(shared))
        request.results = found.results
        await shared.charged()
        if reused:
            await call.record(_free_usages(request, found.results, reused))
        else:
            call, reused = shared.call, "shared" if shared.from_elsewhere else None
            self._metrics.predicted(call.eta_s, client.age_s)
            request.cleanup.callback(call.close)  # also if others still take part
            if not shared.from_elsewhere:
                for image, result in zip(request.parsed.images, found.results, strict=True):
                    self._on_generated(image, result)
        if (key := request.cache_key) and not shared.from_elsewhere:
            shared.cache(lambda: self._write_to_cache(key, request, found))
        return self._json_answer(request, call, reused or _cache_miss(request), content)

    async def _join(self, request: _OpenRequest) -> SharedGeneration | None:
        """Join an equal request that is open.

        Returns None if there is none, or if the Dispatcher refused it. This request then has to
        open a call of its own.
        """
        in_flight = self.reuse.in_flight
        while request.cache_key and (shared := in_flight.get(request.cache_key)):
            request.cleanup.enter_context(shared.joined(request.client))
            if await request.client.run(shared.was_admitted()):
                return shared
        return None

    def _begin(self, request: _OpenRequest) -> SharedGeneration:
        """Open a call for the images; from now on equal requests may join this one."""
        steps = _Steps(self, request)
        images, held = request.parsed.images, request.held
        shared = SharedGeneration(request.client, steps, self._attempts, images, held)
        request.held = None  # it belongs to all who take part
        if request.cache_key:
            self.reuse.in_flight[request.cache_key] = shared
        request.cleanup.enter_context(shared.joined(request.client))
        return shared

    async def _streamed(self, request: _OpenRequest) -> Response:
        """Answer with the events of one image. A streamed image is never shared."""
        parsed, client = request.parsed, request.client
        (image,) = parsed.images
        call = self.open_call(request, request.queued, client)
        request.cleanup.callback(call.close)
        await client.run(call.admitted())

        async def generate(on_progress: OnProgress) -> ImageResult:
            edited = request.held.pixels if request.held else None
            work = self._attempts.generate(image, call, 0, parsed.options, on_progress, edited)
            try:
                result, usage = await client.run(work)
                request.release()
                await call.record([usage])
            except BaseException as error:
                request.error = error
                raise
            self._metrics.predicted(call.eta_s, client.age_s)
            request.results = (result,)
            self._on_generated(image, result)
            if key := request.cache_key:
                self._in_background(self._write_to_cache(key, request, CachedImages((result,))))
            return result

        frames = events(image, generate, self._keep_alive_s)
        use = _cache_miss(request)
        return self._event_stream(request, call, use, await anext(frames), frames)

    # -- parts of an answer ---------------------------------------------------------------------

    def open_call(
        self,
        request: _OpenRequest,
        images: Sequence[QueuedImage],
        client: CallClient,
        usages: Sequence[UsageRecord] = (),
        result_key: str = "",
    ) -> OpenCall:
        return self.session.open(
            request.tenant,
            request.request_id,
            images,
            request.parsed.timeout_s,
            client,
            request.client.age_s,
            usages,
            result_key,
            request.key_id,
            request.call_id,
        )

    async def _admitted_without_work(
        self, request: _OpenRequest, usages: Sequence[UsageRecord] = ()
    ) -> OpenCall:
        """Open a call that needs no new images, because it gets cached or shared ones.

        The Dispatcher admits such a call too, because it counts for some of the tenant's limits.
        `usages`: records that are written once the call is admitted.
        """
        call = self.open_call(request, [], request.client, usages)
        request.cleanup.callback(call.close)
        await request.client.run(call.admitted())
        return call

    async def _write_to_cache(self, key: str, request: _OpenRequest, found: CachedImages) -> None:
        await self.reuse.remember(key, request.tenant, request.parsed.images, found)

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def store(self, request: _OpenRequest, results: Sequence[ImageResult]) -> list[str]:
        return await self._urls.store(request.parsed.images, results, request.tenant)

    async def _body(
        self, request: _OpenRequest, results: Sequence[ImageResult], names: Sequence[str]
    ) -> bytes:
        urls = [self._urls.url(name, request.http) for name in names if request.parsed.as_url]
        arguments = request.parsed.images, results, urls
        if urls or sum(len(result.image) for result in results) < LARGE_IMAGES:
            return response(*arguments)
        return await asyncio.to_thread(response, *arguments)

    def _json_answer(
        self, request: _OpenRequest, call: OpenCall, use: CacheUse, body: bytes
    ) -> JsonAnswer:
        headers = self._headers(request, call, use)
        return JsonAnswer(body, headers, request.cleanup.pop_all().close)

    def _event_stream(
        self, request: _OpenRequest, call: OpenCall, use: CacheUse, first: bytes, frames: Frames
    ) -> EventStream:
        headers = self._headers(request, call, use)
        return EventStream(first, frames, headers, request.cleanup.pop_all().close)

    def _headers(self, request: _OpenRequest, call: OpenCall, use: CacheUse) -> dict[str, str]:
        request.cache_use = use
        headers = {
            **ignored_header(request.parsed.ignored),
            **rate_limit_headers(call.rate_limits),
        }
        if call.eta_s is not None:
            headers["x-octet-eta-s"] = f"{call.eta_s:.3f}"
        return {**headers, "x-octet-cache": use}


@dataclass(frozen=True, slots=True)
class _Steps:
    """The `GenerationSteps` of a request."""

    handler: GenerationHandler
    request: _OpenRequest

    def open_call(self, client: CallClient) -> OpenCall:
        request = self.request
        key = self.handler.reuse.shared_key(request.cache_key)
        return self.handler.open_call(request, request.queued, client, result_key=key)

    async def find(self) -> CachedImages | None:
        key = self.request.cache_key
        return await self.handler.reuse.find(key, self.request.tenant) if key else None

    async def store(self, results: Sequence[ImageResult]) -> list[str]:
        return await self.handler.store(self.request, results)

    def free_usages(self, results: Sequence[ImageResult]) -> list[UsageRecord]:
        return _free_usages(self.request, results, "shared")

    def on_closed(self, shared: SharedGeneration) -> None:
        key, reuse = self.request.cache_key, self.handler.reuse
        if key and reuse.in_flight.get(key) is shared:
            del reuse.in_flight[key]
            if shared_key := reuse.shared_key(key):
                self.handler.session.finish(shared_key)


def _cache_miss(request: _OpenRequest) -> CacheUse:
    return "miss" if request.cache_key else "off"


async def _at_once(result: ImageResult) -> ImageResult:
    return result


def _free_usages(
    request: _OpenRequest,
    results: Sequence[ImageResult],
    outcome: Literal["hit", "shared"],
) -> list[UsageRecord]:
    """The usage records of images that cost nothing, because they were cached or shared.

    Their field `call` is empty: the call fills it in.
    """

    def usage(index: int, image: ImageRequest, result: ImageResult) -> UsageRecord:
        fp8 = result.precision.startswith("fp8")
        return UsageRecord(
            call="",
            image=index,
            tenant=request.tenant,
            request_id=request.request_id,
            model=image.model,
            precision=Precision.FP8 if fp8 else Precision.FP16,
            size=image.size,
            steps=image.steps,
            work_s=0.0,
            outcome=outcome,
            key_id=request.key_id,
            preset=image.preset,
        )

    pairs = zip(request.parsed.images, results, strict=True)
    return [usage(i, image, result) for i, (image, result) in enumerate(pairs)]
