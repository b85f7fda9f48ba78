"""One image, from the queue to its bytes, on a replica that survives it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException

from ..dispatch.dispatcher import REPLICA_LEASE_S
from ..dispatch.grants import Lease, Pools
from ..dispatch.session import DispatchSession
from ..errors import InvalidRequest, NonFiniteImage, OctetError, ReplicaLost, Unavailable
from ..lost import REPLICA_LOST
from ..request import ImageRequest, ImageResult, Precision
from ..settings import ServedModel

log = logging.getLogger("ray.serve")

ATTEMPTS = 3  # a request whose replica dies is tried twice more, then it counts as the cause
BEGIN_S = REPLICA_LEASE_S  # a replica that has not begun by then is gone, or on its way out


class NotBegun(Exception):
    """No replica of the granted pool took the request, or it gave it up for want of a session."""


class Drawing:
    """Grants from the Dispatcher, calls to the Generators, and what follows if one fails."""

    def __init__(
        self,
        models: Iterable[ServedModel],
        session: DispatchSession,
        generators: Mapping[str, Any],
    ) -> None:
        """`generators`: a streaming handle for each pool."""
        self._models = {model.id: model for model in models}
        self._session, self._generators = session, generators

    async def draw(self, request: ImageRequest, request_id: str) -> ImageResult:
        """Raises `InvalidRequest` if the model has no such pool, and any other `OctetError`."""
        began, pools, lost = time.monotonic(), self._pools(request, request.precision), 0
        accepted = False
        while True:
            async with self._session.slot(pools, request_id, accepted=accepted) as lease:
                accepted, pool = True, lease.pool
                queue_s = time.monotonic() - began
                try:
                    result = await self._on_replica(request, lease)
                except NotBegun:
                    log.warning("%s: no replica of %s began; queueing again", request.id, pool)
                    pools = _last(pool, pools)
                except REPLICA_LOST:
                    lost += 1
                    log.warning("%s: attempt %d lost its replica of %s", request.id, lost, pool)
                    if lost == ATTEMPTS:
                        raise ReplicaLost(
                            f"the replica was lost in each of {ATTEMPTS} attempts"
                        ) from None
                    pools = _last(pool, pools)
                except RayServeException:
                    raise Unavailable(f"{pool} cannot be reached") from None
                except RayTaskError as error:
                    if not isinstance(error.cause, OctetError):
                        raise
                    again = self._after(error.cause, request)
                    if again in ((), (pool,)):
                        raise error.cause from None
                    log.warning("%s: %s; drawing it in 16 bit", request.id, error.cause)
                    pools = again
                else:
                    return replace(result, timings=replace(result.timings, queue_s=queue_s))

    async def _on_replica(self, request: ImageRequest, lease: Lease) -> ImageResult:
        stream = self._generators[lease.pool].generate.remote(request, lease)
        try:
            try:
                async with asyncio.timeout(BEGIN_S) as limit:
                    await anext(stream)
            except TimeoutError:
                if not limit.expired():
                    raise  # the replica's own
                stream.cancel()
                raise NotBegun from None
            result: ImageResult = await anext(stream)
        except asyncio.CancelledError:
            stream.cancel()  # else the replica draws on in a slot that counts as free
            if (task := asyncio.current_task()) and not task.cancelling():
                raise NotBegun from None  # the replica gave it up, and we did not
            raise
        return result

    def _pools(self, request: ImageRequest, precision: Precision) -> Pools:
        """The pools a request may run in, preferred first."""
        model = self._models[request.model]
        pools = tuple(
            model.pool_name(pool)
            for pool in model.pools
            if precision in (Precision.AUTO, pool.precision)
        )
        if not pools:
            there = ", ".join(pool.precision for pool in model.pools)
            raise InvalidRequest(
                f"precision '{precision}': {model.id} is served in {there}", param="precision"
            )
        return pools

    def _after(self, error: OctetError, request: ImageRequest) -> Pools:
        """The pools in which a failed image may be drawn once more; none ends it."""
        if not isinstance(error, NonFiniteImage):
            return ()
        try:
            return self._pools(request, Precision.FP16)
        except InvalidRequest:
            return ()


def _last(pool: str, pools: Pools) -> Pools:
    """The same pools, one of them last: its replicas may all be gone."""
    return (*(p for p in pools if p != pool), pool)
