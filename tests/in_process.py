"""Deployments joined in one process instead of by Ray."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

from autoscaling.load import PoolBounds, ScalingLimits
from cluster.placement import Node, NodeRequirement
from serve.deployments import INGRESS
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.protocol import Timing


class Handle:
    """A stand-in for a Serve handle: calls return awaitables, or streams that can be cancelled."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.answering = asyncio.Event()  # while it is not set, answers of calls are held back
        self.answering.set()
        self.streams: list[Stream] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

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
                handle.calls.append((method, args))
                result = getattr(handle.target, method)(*args)
                if not hasattr(result, "__anext__"):
                    return handle._answer(result)
                handle.streams.append(Stream(result))
                return handle.streams[-1]

        return Method()

    async def _answer(self, work: Any) -> Any:
        """The result of a call, which is lost if the replica dies before it is answered."""
        called, result = self.target, await work
        await self.answering.wait()
        if self.target is not called:
            raise ConnectionError("the replica died")
        return result

    def drop_messages(self) -> None:
        """Lose all further messages of the replica, like when it dies before they arrive."""
        self.answering.clear()
        for stream in self.streams:
            stream.dropping = True

    def break_off(self, fresh: Any) -> None:
        """Let the replica die and `fresh` take its place."""
        self.target = fresh
        self.answering.set()
        for stream in self.streams:
            stream.cancel()


class Stream:
    """Messages of a replica, until it dies or the caller cancels them."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self.items = items
        self.dropping = False
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
        return await anext(self) if self.dropping else item.result()


class Client:
    """A client that stays until it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def unwanted(self) -> bool:
        return self.cancelled


# Timing of a Dispatcher without a recovery time after its start, and with quick reconnects.
PROMPT = Timing(recovery_s=0.0, reconnect_s=0.01)


def a_dispatcher(
    *pools: str,
    max_queued: int = 9,
    database: dict[str, Any] | None = None,
    data_folder: str | None = None,
    tenants_folder: str | None = None,
    keyed: bool = False,
    limits: ScalingLimits | None = None,
    nodes: list[Node] | None = None,
    drained: list[str] | None = None,
    ingresses: int = 0,
    timing: Timing = PROMPT,
    cluster: str = "",
) -> Dispatcher:
    """A Dispatcher of pools that fit on its only node; a pool named "elsewhere" does not.

    The caller may change `nodes` while the Dispatcher runs. `drained` gets the ids of the nodes
    that the Dispatcher wants Ray to drain.
    """
    needs = {p: NodeRequirement("fp16", 1, float(p == "elsewhere")) for p in pools}
    alive = [Node("n", num_cpus=1)] if nodes is None else nodes
    dispatcher = Dispatcher(
        "queued-work",
        database,
        data_folder,
        tenants_folder,
        keyed,
        lambda: alive,
        drained.append if drained is not None else lambda _node: None,
        lambda: {INGRESS: {"RUNNING": ingresses}},
        timing,
        lambda: cluster or uuid.uuid4().hex,
    )
    limits = limits or ScalingLimits({pool: PoolBounds("m", 0, 9, 4) for pool in pools})
    dispatcher.apply(needs, limits, max_queued)
    return dispatcher
