"""Server-sent events of one image: OpenAI's previews and finished image, and Octet's progress."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import OctetError
from ...request import ImageRequest, ImageResult, OnProgress, PartialImage, Progress
from .http_errors import UNEXPECTED
from .response import Event, completed_event, error_event, partial_image_event, progress_event

log = logging.getLogger("ray.serve")

Frames = AsyncGenerator[bytes, None]


class EventStream(StreamingResponse):
    """A response that streams events: first the frame `first`, then all of `frames`.

    The caller gets `first` before it makes this response. So an error before the first frame can
    still be answered with its own HTTP status. A later error becomes the stream's last event.
    `sent` is called when everything has been sent or the client has disconnected.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, frames: Frames, headers: dict[str, str], sent: Callable[[], None]
    ) -> None:
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_with_errors(first, frames), headers={**own, **headers})
        self._frames, self._sent = frames, sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._frames.aclose()
            finally:
                self._sent()


async def _with_errors(first: bytes, frames: Frames) -> Frames:
    """Yield all frames; if `frames` raises an error, yield that error as the last frame."""
    try:
        yield first
        async for frame in frames:
            yield frame
    except OctetError as error:
        yield _frame(error_event(error))
    except Exception:  # `unexpected_error` comes too late: the status has been sent
        log.exception("unexpected error in a stream")
        yield _frame(error_event(OctetError(UNEXPECTED)))


async def events(
    request: ImageRequest,
    generate: Callable[[OnProgress], Coroutine[Any, Any, ImageResult]],
    keep_alive_s: float = 10.0,
) -> Frames:
    """Generate an image, and yield its events as frames; the last one is the finished image.

    `generate`: generates the image, and reports its progress to the given function. After
    `keep_alive_s` seconds without an event a comment is sent, so that proxies keep the connection
    open. Raises what `generate` raises. Closing the frames cancels `generate`.
    """
    pending: asyncio.Queue[Progress | PartialImage | None] = asyncio.Queue()  # None: the end
    generation = asyncio.create_task(generate(pending.put_nowait))
    generation.add_done_callback(lambda _: pending.put_nowait(None))
    previews = 0
    try:
        while True:
            try:
                async with asyncio.timeout(keep_alive_s):
                    event = await pending.get()
            except TimeoutError:
                yield b": still here\n\n"
                continue
            if event is None:
                break
            if isinstance(event, Progress):
                yield _frame(progress_event(request, event))
            elif event.index >= previews:  # a second attempt generates the first previews again
                previews = event.index + 1
                yield _frame(await asyncio.to_thread(partial_image_event, request, event))
        yield _frame(await asyncio.to_thread(completed_event, request, await generation))
    finally:
        generation.cancel()


def _frame(event: Event) -> bytes:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()
