"""From an understood request for images to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..dispatch.client.open_call import OpenCall, Wish
from ..dispatch.client.refusals import standing_headers
from ..dispatch.client.session import DispatchSession
from ..request import ImageRequest, ImageResult, Precision
from ..results.cache.memory import CachedImages
from ..usage.record import UsageRecord
from .attempts import Attempts, Tell, usage_of
from .client_call import ClientCall
from .image_urls import ImageUrls
from .ingress_metrics import IngressMetrics
from .request_log import log_request, outcome_of
from .result_reuse import ResultReuse
from .single_flight import SharedGeneration
from .wire.event_stream import EventStream, Frames, events
from .wire.request import GenerationRequest, ignored_header
from .wire.response import response

CacheUse = Literal["hit", "miss", "shared", "off"]


class JsonAnswer(Response):
    """JSON; calls `sent` when it has been sent, or the client is gone."""

    media_type = "application/json"

    def __init__(self, body: bytes, headers: dict[str, str], sent: Callable[[], None]) -> None:
        super().__init__(body, headers=headers)
        self._sent = sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._sent()


@dataclass(slots=True)
class _Asking:
    """A client's request; `opened`: what ends with its answer."""

    asked: GenerationRequest
    tenant: str
    request_id: str
    http: Request
    wishes: Sequence[Wish]
    key: str | None  # of the result cache
    client: ClientCall
    opened: ExitStack
    use: CacheUse = "off"
    error: BaseException | None = None  # after its answer had begun
    results: Sequence[ImageResult] = ()


class GenerationHandler:
    def __init__(
        self,
        session: DispatchSession,
        drawing: Attempts,
        urls: ImageUrls,
        repeats: ResultReuse,
        metrics: IngressMetrics,
    ) -> None:
        self._session, self._drawing = session, drawing
        self._urls, self._repeats, self._metrics = urls, repeats, metrics
        self._tasks: set[asyncio.Task[None]] = set()  # that nobody waits for

    async def answer(
        self, asked: GenerationRequest, tenant: str, request_id: str, http: Request
    ) -> Response:
        """Raises any `OctetError`."""
        if asked.as_url:
            self._urls.admit()
        wishes = [self._drawing.wish(request, asked.watch) for request in asked.requests]
        key = self._repeats.key(asked, tenant, http.headers)
        client = ClientCall(asked.timeout_s)
        with ExitStack() as opened:
            asking = _Asking(asked, tenant, request_id, http, wishes, key, client, opened)
            opened.enter_context(self._counting(asking))
            if asking.key and (found := await client.run(self._repeats.find(asking.key, tenant))):
                return await self._from_memory(asking, found)
            if asked.stream:
                return await self._streamed(asking)
            return await self._drawn(asking)

    @contextmanager
    def _counting(self, asking: _Asking) -> Iterator[None]:
        """Until the answer has been sent."""
        model, began = asking.asked.requests[0].model, time.monotonic()
        try:
            yield
        except BaseException as error:
            asking.error = error
            raise
        finally:
            took_s = time.monotonic() - began
            if asking.error:
                outcome = outcome_of(asking.error)
                self._metrics.ended(model, *outcome)
            else:
                outcome = "ok", 200
                self._metrics.answered(model, asking.use, took_s)
            log_request(
                asking.asked,
                asking.tenant,
                asking.request_id,
                asking.use,
                asking.results,
                *outcome,
                took_s,
            )

    # -- images that are there already ----------------------------------------------------------

    async def _from_memory(self, asking: _Asking, found: CachedImages) -> Response:
        asked, call = asking.asked, await self._entered(asking)

        async def serve() -> bytes:
            names = list(found.names)
            if asked.as_url and not names:
                names = await self._store(asking, found.results)
            return await self._body(asking, found.results, names)

        body = b"" if asked.stream else await asking.client.run(serve())
        await call.record(_repeated(asked, call, found.results, "hit"))
        if not asked.stream:
            return self._answer(asking, call, "hit", body)
        frames = events(asked.requests[0], lambda _: _at_once(found.results[0]))
        return self._stream(asking, call, "hit", await anext(frames), frames)

    # -- images that are drawn ------------------------------------------------------------------

    async def _drawn(self, asking: _Asking) -> Response:
        client = asking.client
        repeated: Literal["hit", "shared"] | None = None
        flight = await self._join(asking)
        if flight:
            repeated = "hit" if flight.remembered else "shared"
            call = await self._entered(asking)
        else:
            flight = self._begin(asking)
            call = flight.call
            await client.run(flight.admitted())

        async def serve(flight: SharedGeneration) -> tuple[bytes, CachedImages]:
            results = await flight.images()
            names = await flight.names() if asking.asked.as_url else []
            found = CachedImages(tuple(results), tuple(names))
            return await self._body(asking, results, names), found

        body, found = await client.run(serve(flight))
        asking.results = found.results
        await flight.charged()
        if repeated:
            await call.record(_repeated(asking.asked, call, found.results, repeated))
        else:
            self._metrics.predicted(call.eta_s, client.age_s)
            asking.opened.callback(call.close)  # whoever stays in the flight
        if not flight.remembered:  # who comes meanwhile finds the images in the flight
            flight.remembered = True
            flight.join()
            self._remember(asking, found, flight.leave)
        return self._answer(asking, call, repeated or _use(asking), body)

    async def _join(self, asking: _Asking) -> SharedGeneration | None:
        """The flight that is under way, unless it was refused: then this request is the next."""
        while asking.key and (flight := self._repeats.flights.get(asking.key)):
            flight.join()
            with ExitStack() as seat:
                seat.callback(_leave, flight, asking.client)
                if await asking.client.run(flight.taken()):
                    asking.opened.callback(seat.pop_all().close)
                    return flight
        return None

    def _begin(self, asking: _Asking) -> SharedGeneration:
        asked, key, flights = asking.asked, asking.key, self._repeats.flights

        def landed() -> None:
            if key and flights.get(key) is flight:
                del flights[key]

        flight = SharedGeneration(asking.client, landed)
        call = self._open(asking, asking.wishes, flight)
        drawn: list[UsageRecord] = []

        async def draw() -> list[ImageResult]:
            found = await self._draw_all(asked, call)
            drawn.extend(usage for _, usage in found)
            return [result for result, _ in found]

        async def store() -> list[str]:
            return await self._store(asking, await flight.images())

        async def charge() -> None:
            await call.record(drawn)

        flight.begin(call, draw, store, charge)
        if key:
            flights[key] = flight
        asking.opened.callback(_leave, flight, asking.client)
        return flight

    async def _draw_all(
        self, asked: GenerationRequest, call: OpenCall
    ) -> list[tuple[ImageResult, UsageRecord]]:
        """The images of one call, side by side; the first error ends them all."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._drawing.draw(request, call, i))
                    for i, request in enumerate(asked.requests)
                ]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _streamed(self, asking: _Asking) -> Response:
        """The events of the one image of a call of its own."""
        asked, client = asking.asked, asking.client
        (request,) = asked.requests
        call = self._open(asking, asking.wishes, client)
        asking.opened.callback(call.close)
        await client.run(call.admitted())

        async def draw(tell: Tell) -> ImageResult:
            drawing = self._drawing.draw(request, call, 0, asked.watch, tell)
            try:
                result, usage = await client.run(drawing)
                await call.record([usage])
            except BaseException as error:
                asking.error = error
                raise
            self._metrics.predicted(call.eta_s, client.age_s)
            asking.results = (result,)
            self._remember(asking, CachedImages((result,)))
            return result

        frames = events(request, draw)
        return self._stream(asking, call, _use(asking), await anext(frames), frames)

    def _remember(
        self, asking: _Asking, found: CachedImages, then: Callable[[], None] = lambda: None
    ) -> None:
        """Behind the answer."""
        key, tenant, requests = asking.key, asking.tenant, asking.asked.requests
        if key is None:
            then()
            return
        task = asyncio.create_task(self._repeats.remember(key, tenant, requests, found))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: then())

    # -- parts of an answer ---------------------------------------------------------------------

    def _open(
        self, asking: _Asking, wishes: Sequence[Wish], client: ClientCall | SharedGeneration
    ) -> OpenCall:
        who = asking.tenant, asking.request_id
        return self._session.open(*who, wishes, asking.asked.timeout_s, client)

    async def _entered(self, asking: _Asking) -> OpenCall:
        """A call that needs no work: its tenant's limits hold for it too."""
        call = self._open(asking, [], asking.client)
        asking.opened.callback(call.close)
        await asking.client.run(call.admitted())
        return call

    async def _store(self, asking: _Asking, results: Sequence[ImageResult]) -> list[str]:
        return await self._urls.store(asking.asked.requests, results, asking.tenant)

    async def _body(
        self, asking: _Asking, results: Sequence[ImageResult], names: Sequence[str]
    ) -> bytes:
        urls = [self._urls.url(name, asking.http) for name in names if asking.asked.as_url]
        return await asyncio.to_thread(response, asking.asked.requests, results, urls)

    def _answer(self, asking: _Asking, call: OpenCall, use: CacheUse, body: bytes) -> JsonAnswer:
        headers = self._headers(asking, call, use)
        return JsonAnswer(body, headers, asking.opened.pop_all().close)

    def _stream(
        self, asking: _Asking, call: OpenCall, use: CacheUse, first: bytes, frames: Frames
    ) -> EventStream:
        headers = self._headers(asking, call, use)
        return EventStream(first, frames, headers, asking.opened.pop_all().close)

    def _headers(self, asking: _Asking, call: OpenCall, use: CacheUse) -> dict[str, str]:
        asking.use = use
        headers = {**ignored_header(asking.asked.ignored), **standing_headers(call.standings)}
        if call.eta_s is not None:
            headers["x-octet-eta-s"] = f"{call.eta_s:.3f}"
        return {**headers, "x-octet-cache": use}


def _use(asking: _Asking) -> CacheUse:
    return "miss" if asking.key else "off"


def _leave(flight: SharedGeneration, client: ClientCall) -> None:
    flight.leave(unwanted=client.unwanted)


async def _at_once(result: ImageResult) -> ImageResult:
    return result


def _repeated(
    asked: GenerationRequest,
    call: OpenCall,
    results: Sequence[ImageResult],
    outcome: Literal["hit", "shared"],
) -> list[UsageRecord]:
    """What is recorded of images that cost nothing this time."""

    def usage(image: int, request: ImageRequest, result: ImageResult) -> UsageRecord:
        fp8 = result.precision.startswith("fp8")
        precision = Precision.FP8 if fp8 else Precision.FP16
        return usage_of(call, image, request, precision, 0.0)._replace(outcome=outcome)

    pairs = zip(asked.requests, results, strict=True)
    return [usage(i, request, result) for i, (request, result) in enumerate(pairs)]
