"""Deployments joined in one process instead of by Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from autoscaling.load import PoolBounds as PoolLimits
from autoscaling.load import ScalingLimits
from cluster.placement import Node, NodeRequirement
from serve.dispatch.dispatcher import Dispatcher


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

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        item = asyncio.ensure_future(anext(self.items))
        broken = asyncio.create_task(self.broken.wait())
        try:
            await asyncio.wait([item, broken], return_when=asyncio.FIRST_COMPLETED)
        finally:
            broken.cancel()
            if not item.done():
                item.cancel()
        if not item.done():
            raise ConnectionError("the replica died")
        return item.result()


class Someone:
    """A client that stays until it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def unwanted(self) -> bool:
        return self.cancelled


def a_dispatcher(
    *pools: str,
    max_queued: int = 9,
    recovery_s: float = 0,
    tenants_folder: str | None = None,
    usage_folder: str | None = None,
    limits: ScalingLimits | None = None,
) -> Dispatcher:
    """A Dispatcher of pools that fit on the one node there is, but for "elsewhere"."""
    needs = {
        p: NodeRequirement("fp16", num_cpus=1, num_gpus=float(p == "elsewhere")) for p in pools
    }
    nodes = [Node("n", num_cpus=1)]
    dispatcher = Dispatcher(
        needs,
        limits or ScalingLimits({pool: PoolLimits("m", 0, 9, 4) for pool in pools}),
        "queued-work",
        tenants_folder,
        usage_folder,
        lambda: nodes,
        recovery_s,
    )
    dispatcher.reconfigure({"max_queued": max_queued})
    return dispatcher
