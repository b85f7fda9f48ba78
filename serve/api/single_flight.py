"""One generation for all who ask for the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from ..dispatch.client.open_call import OpenCall
from ..errors import OctetError
from ..request import ImageResult
from .client_call import ClientCall

T = TypeVar("T")
Step = Callable[[], Coroutine[Any, Any, T]]


class Once(Generic[T]):
    """Work that the first begins, all await, and none of them ends by going away."""

    def __init__(self, work: Step[T]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await asyncio.shield(self._task)

    def cancel(self) -> None:
        if self._task:
            self._task.cancel()


class SharedGeneration:
    """Images on their way to all who wait for them, as a call of the first of those.

    It goes on while anybody is left, whoever that is. It is the `Client` of its call.
    """

    def __init__(self, first: ClientCall, landed: Callable[[], None]) -> None:
        """`landed` is called, more than once too, when nobody is to join any more."""
        self._first, self._landed = first, landed
        self._present = 1
        self.unwanted = False
        self.remembered = False
        self.call: OpenCall

    def begin(
        self,
        call: OpenCall,
        draw: Step[list[ImageResult]],
        store: Step[list[str]],
        charge: Step[None],
    ) -> None:
        """`store`, if anybody needs names; `charge` before anybody is answered."""
        self.call = call
        self.admitted = Once(lambda: self._or_land(call.admitted))
        self.images = Once(lambda: self._or_land(draw))
        self.names, self.charged = Once(store), Once(lambda: self._or_land(charge))

    def cancel(self) -> None:
        """Another call ends that of the first; the others stay."""
        self._first.cancel()

    async def taken(self) -> bool:
        """Whether it was admitted. What it was refused for is the first one's affair."""
        try:
            await self.admitted()
        except OctetError:
            return False
        return True

    def join(self) -> None:
        self._present += 1

    def leave(self, *, unwanted: bool = False) -> None:
        """For everyone once, the first too. `unwanted`: by a client that has ended its call."""
        self._present -= 1
        if self._present:
            return
        self.unwanted = unwanted
        for step in (self.admitted, self.images, self.names, self.charged):
            step.cancel()
        self.call.close()
        self._landed()

    async def _or_land(self, work: Step[T]) -> T:
        try:
            return await work()
        except BaseException:
            self._landed()
            raise
