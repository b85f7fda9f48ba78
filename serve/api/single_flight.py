"""Single flight: equal requests that are open at the same time share one generation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from ..dispatch.client.attempts import Attempts
from ..dispatch.client.client_call import ClientCall
from ..dispatch.client.open_call import CallClient, OpenCall
from ..errors import OctetError
from ..request import ImageRequest, ImageResult
from ..results.cache.memory import CachedImages
from ..usage.record import UsageRecord
from .edit_uploads import HeldPicture

T = TypeVar("T")


class Stage(Generic[T]):
    """Work that starts at the first call and whose result all callers share.

    The work goes on if a caller is cancelled.
    """

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


class GenerationSteps(Protocol):
    """The steps of a shared generation that depend on the request for it."""

    def open_call(self, client: CallClient) -> OpenCall:
        """Open a call for the images."""

    async def find(self) -> CachedImages | None:
        """Look for the images in the result cache."""

    async def store(self, results: Sequence[ImageResult]) -> list[str]:
        """Store the images; return their names."""

    def free_usages(self, results: Sequence[ImageResult]) -> list[UsageRecord]:
        """The usage records of images that another Ingress has had generated."""

    def on_closed(self, shared: SharedGeneration) -> None:
        """Note that clients can no longer join; called perhaps more than once."""


class SharedGeneration:
    """The images of one call, for all clients that ask for the same.

    The first client's request opens the call; the tenant is charged once, by that call. Each stage
    runs once, when a client first awaits it:

        admitted ──► images ──► names (if anybody wants URLs) ──► charged ──► cached
            │           │                                            │
            └───────────┴── an error: nobody joins any more ─────────┘

    If another Ingress is generating the same images, the call follows that one: the stage `images`
    waits for it and then takes the images from the result cache. If they are not there, it opens
    another call and has them generated.

    The participants are the clients, and the task that writes the images to the result cache. When
    the last participant leaves, the stages are cancelled and the call is closed. For its call, this
    object is the `CallClient`.
    """

    def __init__(
        self,
        first: ClientCall,
        steps: GenerationSteps,
        attempts: Attempts,
        requests: Sequence[ImageRequest],
        held: HeldPicture | None = None,
    ) -> None:
        """`held`: an edit's picture and mask, which this object lets go when it can."""
        self._first, self._steps = first, steps
        self._attempts, self._requests, self._held = attempts, requests, held
        self._participants = 0
        self._usages: list[UsageRecord] = []
        self._found: CachedImages | None = None  # that another Ingress has had generated
        self._caching: asyncio.Task[None] | None = None
        self.unwanted = False
        self.admitted = Stage(lambda: self._or_close(self.call.admitted()))
        self.images = Stage(lambda: self._or_close(self._images_and_release()))
        self.names = Stage(self._names)
        self.charged = Stage(lambda: self._or_close(self.call.record(self._usages)))
        self.call = steps.open_call(self)

    @property
    def from_elsewhere(self) -> bool:
        """Return whether another Ingress has had the images generated."""
        return self._found is not None

    @property
    def finished(self) -> bool:
        """Return whether the images are done and charged, so that joining counts as a cache hit."""
        return self._caching is not None

    def cancel(self) -> None:
        """End the request of the first client, which was cancelled by its id.

        The other clients still get the images.
        """
        self._first.cancel()

    @contextmanager
    def joined(self, client: ClientCall) -> Iterator[None]:
        """Take part until the block ends.

        Every client, including the first, must do this exactly once.
        """
        self._participants += 1
        try:
            yield
        finally:
            self._leave(unwanted=client.unwanted)

    async def was_admitted(self) -> bool:
        """Wait for the Dispatcher's decision; returns whether the call was admitted.

        If it was refused, only the first client gets the error; a client that wanted to join may
        open a call of its own.
        """
        try:
            await self.admitted()
        except OctetError:
            return False
        return True

    def cache(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Write the images to the result cache, if no other client has begun to.

        The writing takes part like a client. So clients that come before it has ended still find
        the images here.
        """
        if self._caching is None:
            self._participants += 1
            self._caching = asyncio.create_task(write())
            self._caching.add_done_callback(lambda _: self._leave())

    async def _images_and_release(self) -> list[ImageResult]:
        try:
            return await self._images()
        finally:
            self._release()

    def _release(self) -> None:
        if self._held:
            self._held.release()

    async def _images(self) -> list[ImageResult]:
        while await self.call.leader_finished():
            self._found = await self._steps.find()
            if self._found:
                self._usages += self._steps.free_usages(self._found.results)
                return list(self._found.results)
            self.call.close()
            self.call = self._steps.open_call(self)
            await self.call.admitted()
        return await self._generate()

    async def _generate(self) -> list[ImageResult]:
        """Generate the call's images at the same time; the first error cancels the others."""
        edited = self._held.pixels if self._held else None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._attempts.generate(request, self.call, i, edited=edited))
                    for i, request in enumerate(self._requests)
                ]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        images = [task.result() for task in tasks]
        self._usages += [image.usage for image in images]
        return [image.result for image in images]

    async def _names(self) -> list[str]:
        results = await self.images()
        if self._found and self._found.names:
            return list(self._found.names)
        return await self._steps.store(results)

    async def _or_close(self, work: Awaitable[T]) -> T:
        """Await `work`; if it fails, no more clients may join."""
        try:
            return await work
        except BaseException:
            self._steps.on_closed(self)
            raise

    def _leave(self, *, unwanted: bool = False) -> None:
        self._participants -= 1
        if self._participants:
            return
        self.unwanted = unwanted
        for stage in (self.admitted, self.images, self.names, self.charged):
            stage.cancel()
        self.call.close()
        self._release()
        self._steps.on_closed(self)
