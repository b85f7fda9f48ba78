"""Single flight: equal requests that are open at the same time share one generation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ..dispatch.client.open_call import CallClient, OpenCall
from ..errors import OctetError
from ..request import ImageRequest, ImageResult
from ..usage.record import UsageRecord
from .attempts import Attempts
from .client_call import ClientCall

T = TypeVar("T")


class Stage(Generic[T]):
    """Work that the first caller begins and all callers await; no caller ends it by leaving."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await asyncio.shield(self._task)

    def cancel(self) -> None:
        """Stop the work if it has begun."""
        if self._task:
            self._task.cancel()


class SharedGeneration:
    """The images of one call, for all clients that ask for the same.

    The first client's request opens the call; the tenant is charged once, by that call. Each stage
    runs once, when somebody first awaits it:

        admitted ──► images ──► names (if anybody wants URLs) ──► charged ──► cached
            │           │                                            │
            └───────────┴── an error: nobody joins any more ─────────┘

    It lasts while a participant is left: a client, or the task that writes the images to the result
    cache. When the last one leaves, the stages are cancelled and the call is closed. It is the
    `CallClient` of its call.
    """

    def __init__(
        self,
        first: ClientCall,
        open_call: Callable[[CallClient], OpenCall],
        attempts: Attempts,
        requests: Sequence[ImageRequest],
        store: Callable[[Sequence[ImageResult]], Awaitable[list[str]]],
        on_closed: Callable[[SharedGeneration], None],
    ) -> None:
        """`store` keeps images and returns their names.

        `on_closed` is called once no more clients can join, perhaps several times.
        """
        self._first, self._attempts, self._requests = first, attempts, requests
        self._store, self._on_closed = store, on_closed
        self._participants = 0
        self._usages: list[UsageRecord] = []
        self._caching: asyncio.Task[None] | None = None
        self.unwanted = False
        self.admitted = Stage(lambda: self._or_close(self.call.admitted()))
        self.images = Stage(lambda: self._or_close(self._generate()))
        self.names = Stage(self._names)
        self.charged = Stage(lambda: self._or_close(self.call.record(self._usages)))
        self.call = open_call(self)

    @property
    def finished(self) -> bool:
        """Whether the images are there and charged, so that joining is a cache hit."""
        return self._caching is not None

    def cancel(self) -> None:
        """End the first client's call, as another call has asked; the other clients stay."""
        self._first.cancel()

    @contextmanager
    def joined(self, client: ClientCall) -> Iterator[None]:
        """Take part until the block ends. Every client does this exactly once, the first too."""
        self._participants += 1
        try:
            yield
        finally:
            self._leave(unwanted=client.unwanted)

    async def was_admitted(self) -> bool:
        """Whether the call was admitted. A refusal concerns the first client only."""
        try:
            await self.admitted()
        except OctetError:
            return False
        return True

    def cache(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Write the images to the result cache, once; stay open until that is done.

        A client that comes meanwhile finds the images here.
        """
        if self._caching is None:
            self._participants += 1
            self._caching = asyncio.create_task(write())
            self._caching.add_done_callback(lambda _: self._leave())

    async def _generate(self) -> list[ImageResult]:
        """Generate the images side by side; the first error ends them all."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._attempts.generate(request, self.call, i))
                    for i, request in enumerate(self._requests)
                ]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        images = [task.result() for task in tasks]
        self._usages += [image.usage for image in images]
        return [image.result for image in images]

    async def _names(self) -> list[str]:
        return await self._store(await self.images())

    async def _or_close(self, work: Awaitable[T]) -> T:
        """Let nobody join any more if `work` fails."""
        try:
            return await work
        except BaseException:
            self._on_closed(self)
            raise

    def _leave(self, *, unwanted: bool = False) -> None:
        self._participants -= 1
        if self._participants:
            return
        self.unwanted = unwanted
        for stage in (self.admitted, self.images, self.names, self.charged):
            stage.cancel()
        self.call.close()
        self._on_closed(self)
