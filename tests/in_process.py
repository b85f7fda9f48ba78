"""Deployments joined in one process instead of by Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any


class Handle:
    """What a Serve handle does with a call: an awaitable, or a stream that can be cancelled."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.streams: list[Stream] = []

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def __getattr__(self, method: str) -> Any:
        handle = self

        class Method:
            def options(self, stream: bool) -> Method:
                assert stream
                return self

            def remote(self, *args: Any) -> Any:
                result = getattr(handle.target, method)(*args)
                if not hasattr(result, "__anext__"):
                    return result
                handle.streams.append(Stream(result))
                return handle.streams[-1]

        return Method()

    def break_off(self, fresh: Any) -> None:
        """The replica dies and another takes its place."""
        self.target = fresh
        for stream in self.streams:
            stream.cancel()


class Stream:
    def __init__(self, items: AsyncIterator[Any]) -> None:
        self.items = items
        self.broken = asyncio.Event()

    def cancel(self) -> None:
        self.broken.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        broken = asyncio.create_task(self.broken.wait())
        while True:
            item = asyncio.ensure_future(anext(self.items))
            await asyncio.wait([item, broken], return_when=asyncio.FIRST_COMPLETED)
            if not item.done():
                item.cancel()
                raise ConnectionError("the replica died")
            try:
                yield item.result()
            except StopAsyncIteration:
                return
