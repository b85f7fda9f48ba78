"""Server-sent events: previews and progress of an image, as OpenAI's Images API streams them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import OctetError
from ...request import ImageRequest, ImageResult, PartialImage, Progress
from ..attempts import Tell
from .http_errors import UNEXPECTED
from .response import Event, completed_event, error_event, partial_image_event, progress_event

log = logging.getLogger("ray.serve")

ALIVE_S = 10.0  # a comment at least so often, lest proxies think that nobody is there

Frames = AsyncGenerator[bytes, None]


class EventStream(StreamingResponse):
    """Calls `sent` when all has been sent, or the client is gone.

    `first` was awaited before, so that what is refused at once keeps its own status; what goes
    wrong later is an event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, frames: Frames, headers: dict[str, str], sent: Callable[[], None]
    ) -> None:
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_all(first, frames), headers={**own, **headers})
        self._frames, self._sent = frames, sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._frames.aclose()
            finally:
                self._sent()


async def _all(first: bytes, frames: Frames) -> Frames:
    try:
        yield first
        async for frame in frames:
            yield frame
    except OctetError as error:
        yield _frame(error_event(error))
    except Exception:  # the status has been sent: this is the place of `unexpected_error`
        log.exception("unexpected error in a stream")
        yield _frame(error_event(OctetError(UNEXPECTED)))


async def events(
    request: ImageRequest, draw: Callable[[Tell], Coroutine[Any, Any, ImageResult]]
) -> Frames:
    """The events of one image; ends with it. Raises what `draw` raises; closing it ends `draw`."""
    told: asyncio.Queue[Progress | PartialImage | None] = asyncio.Queue()
    drawing = asyncio.create_task(draw(told.put_nowait))
    drawing.add_done_callback(lambda _: told.put_nowait(None))
    previews = 0
    try:
        while True:
            try:
                async with asyncio.timeout(ALIVE_S):
                    event = await told.get()
            except TimeoutError:
                yield b": still here\n\n"
                continue
            if event is None:
                break
            if isinstance(event, Progress):
                yield _frame(progress_event(event))
            elif event.index >= previews:  # a second attempt draws the first ones again
                previews = event.index + 1
                yield _frame(await asyncio.to_thread(partial_image_event, request, event))
        yield _frame(await asyncio.to_thread(completed_event, request, await drawing))
    finally:
        drawing.cancel()


def _frame(event: Event) -> bytes:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()
