"""One image from the queue to its bytes, in as many attempts as it takes.

An image has `ATTEMPTS` attempts, and each death of its replica uses one up. The last attempt runs
alone on its replica, so that it can harm no other image. The first `FREE_RETRIES` deaths of a
replica that has not yet started the image use up no attempt. An image that had non-finite numbers
is generated once more in 16 bit.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from cluster.cost import CostCoefficients

from ...edit_pixels import EditPixels
from ...errors import NoCapacity, OctetError, ReplicaFailed, Unavailable
from ...models.reference_work import shape_of, text_tokens
from ...ray_errors import NO_ROOM, REPLICA_LOST
from ...request import (
    Acknowledgement,
    ImageRequest,
    ImageResult,
    OnProgress,
    Progress,
    StreamOptions,
)
from ...settings.models import ServedModel
from ...usage.record import UsageRecord
from ..protocol import TIMING, Lease, Pools, QueuedImage, Timing
from .open_call import HeldSlot, OpenCall
from .pools import PoolChoice, moved_last

log = logging.getLogger("ray.serve")

ATTEMPTS = 3  # after so many deaths of its replica, the request itself counts as their cause
FREE_RETRIES = 3  # deaths of a replica before it started the image that cost no attempt


class GeneratedImage(NamedTuple):
    """A finished image, and the usage record by which its tenant is charged on delivery."""

    result: ImageResult
    usage: UsageRecord


class NotStarted(Exception):
    """The granted replica did not start the image, or cancelled it by itself.

    `died`: whether the cause is that the replica was lost before it started the image.
    """

    def __init__(self, *, died: bool = False) -> None:
        super().__init__()
        self.died = died


class NotSent(Exception):
    """This node has no room for what is sent to a replica: the picture of an edit."""


@dataclass(slots=True)
class _AttemptHistory:
    """The failed attempts at an image so far, and the pools that its next attempt may use."""

    pools: Pools
    lost: int = 0  # attempts that ended with the death of their replica
    free_retries: int = 0
    failure: OctetError | None = None  # the error after which the image is generated in 16 bit


class AttemptMetrics(Protocol):
    """Counts attempts; `pool` is the granted pool."""

    def queued(self, pool: str, seconds: float) -> None:
        """Note the seconds from the request to the grant of an attempt."""

    def retried(self, pool: str, reason: str) -> None:
        """Note an attempt after which the image is generated again."""

    def routed(self, model: str, rule: str) -> None:
        """Note an image that a rule of the model's `routing` sends to the 16-bit pools."""


class Attempts:
    """Generates images: waits for slots, calls Generators, and tries again after failures."""

    def __init__(
        self,
        pool_handle: Callable[[str], Any],
        metrics: AttemptMetrics,
        timing: Timing = TIMING,
    ) -> None:
        """`pool_handle`: returns a Ray Serve handle of the Generators of the named pool."""
        # Ray cancels a call that was submitted in the context of a request whose client has gone,
        # even a shielded one. Others may wait for the same image, so calls are made outside it.
        self._context = contextvars.copy_context()
        self._models: dict[str, ServedModel] = {}
        self._work: Mapping[str, CostCoefficients] = {}
        self._pools = PoolChoice()
        self._pool_handle = functools.cache(lambda pool: pool_handle(pool).options(stream=True))
        self._metrics, self._timing = metrics, timing

    def set_models(
        self, models: Iterable[ServedModel], work: Mapping[str, CostCoefficients]
    ) -> None:
        """Serve these models from now on; `work`: the reference work of each, by its id."""
        self._models, self._work = {model.id: model for model in models}, work
        self._pools.set_models(self._models.values())

    def queued_image(self, request: ImageRequest, options: StreamOptions) -> QueuedImage:
        """Describe the request for the Dispatcher's queue: its pools and its predicted work.

        Raises `InvalidRequest` if the model is not served in the request's precision, and
        `ModelNotFound` if it is not served any more.
        """
        pools = self._pools.allowed(request)
        tokens = text_tokens(self._models[request.model].max_sequence_length)
        work_s = round(self._work[request.model].work_s(shape_of(request, tokens)), 6)
        return QueuedImage(pools, work_s, options.progress, size=request.size)

    async def generate(
        self,
        request: ImageRequest,
        call: OpenCall,
        index: int = 0,
        options: StreamOptions = StreamOptions(),  # noqa: B008 - immutable
        on_progress: OnProgress = lambda _: None,
        edited: EditPixels | Callable[[], Awaitable[EditPixels]] | None = None,
    ) -> GeneratedImage:
        """Generate image `index` of the call; return it with its usage record.

        `edited`: an edit's picture and mask, or a function that reads them: it is called when the
        image has its slot. `on_progress` is called with the progress and previews
        that `options` ask for. Raises an `OctetError` if no pool can generate the image or its last
        attempt failed, and `RayTaskError` for an unexpected error of the Generator.
        """
        began = time.monotonic()
        history = _AttemptHistory(call.request.images[index].pools)
        if request.routed_by:
            self._metrics.routed(request.model, request.routed_by)

        def on_position(place: int) -> None:
            on_progress(Progress(0, request.steps, queue_position=place))

        while True:
            try:
                heard = on_position if options.progress else None
                last = history.lost == ATTEMPTS - 1
                async with call.slot(index, history.pools, heard, alone=last) as slot:
                    queue_s = time.monotonic() - began
                    self._metrics.queued(slot.lease.pool, queue_s)
                    try:
                        if callable(edited):
                            slot.took_s = 0.0
                            edited = await edited()
                            slot.took_s = None
                        result = await self._attempt(
                            request, slot, history, options, on_progress, edited
                        )
                    except asyncio.CancelledError:
                        if call.client.unwanted and slot.took_s is None:
                            slot.cancelled = self._usage(request, call, index, slot.lease.pool)
                        raise
            except NoCapacity:
                if history.failure:  # no other pool could do better
                    raise history.failure from None
                raise
            if result:
                timings = replace(result.timings, queue_s=queue_s)
                usage = self._usage(request, call, index, slot.lease.pool)
                call.generated.append(usage)
                return GeneratedImage(replace(result, timings=timings), usage)

    async def shadow(self, request: ImageRequest, lease: Lease) -> ImageResult:
        """Generate an image again, by the lease of a shadow; nobody is charged.

        Raises what the attempt fails with.
        """
        return await self._on_replica(
            request, lease, StreamOptions(), lambda _: None, None, alone=False
        )

    def _usage(self, request: ImageRequest, call: OpenCall, index: int, pool: str) -> UsageRecord:
        """The usage record of an image with its full charge; `pool`: where it was generated."""
        return UsageRecord(
            call=call.request.call_id,
            image=index,
            tenant=call.request.tenant,
            request_id=call.request.request_id,
            model=request.model,
            precision=self._pools.precision_of(pool),
            size=request.size,
            steps=request.steps,
            work_s=call.request.images[index].work_s,
            key_id=call.request.key_id,
            preset=request.preset,
        )

    async def _attempt(
        self,
        request: ImageRequest,
        slot: HeldSlot,
        history: _AttemptHistory,
        options: StreamOptions,
        on_progress: OnProgress,
        edited: EditPixels | None,
    ) -> ImageResult | None:
        """Make one attempt at an image.

        Returns None if another attempt may follow; `history` then holds this failure. Raises an
        error if no further attempt makes sense.
        """
        pool, last = slot.lease.pool, history.lost == ATTEMPTS - 1
        try:
            result = await self._on_replica(
                request, slot.lease, options, on_progress, edited, alone=last
            )
            slot.took_s = result.work_s
            return result
        except (NotStarted, *REPLICA_LOST) as error:
            if isinstance(error, NotStarted):
                slot.took_s, slot.refused = 0.0, True
                if not (error.died and history.free_retries == FREE_RETRIES):
                    history.free_retries += error.died
                    log.warning(
                        "%s: its replica of %s did not start; queueing again", request.id, pool
                    )
                    self._metrics.retried(pool, "not_begun")
                    return None
            history.pools = moved_last(pool, history.pools)
            history.lost += 1
            slot.lost = isinstance(error, ActorDiedError)  # other errors may pass
            log.warning("%s: attempt %d lost its replica of %s", request.id, history.lost, pool)
            if last:
                raise ReplicaFailed(f"the replica died in each of {ATTEMPTS} attempts") from None
            self._metrics.retried(pool, "replica_lost")
        except DeploymentUnavailableError:
            # The pool has just been removed, or added again: the image's other pools come first.
            slot.took_s = 0.0
            history.pools = moved_last(pool, history.pools)
            log.warning("%s: %s is not there; queueing again", request.id, pool)
            await asyncio.sleep(self._timing.retry_pause_s)
        except NotSent:
            slot.took_s = 0.0
            raise Unavailable(
                "this server has no memory left to send the picture to a replica: try again"
            ) from None
        except RayServeException:
            slot.took_s = 0.0
            raise Unavailable(f"{pool} cannot be reached") from None
        except RayTaskError as error:
            if not isinstance(error.cause, OctetError):
                raise
            again = self._pools.after_failure(error.cause, request)
            if again in ((), (pool,)):
                raise error.cause from None
            log.warning("%s: %s; generating it in 16 bit", request.id, error.cause)
            self._metrics.retried(pool, "non_finite")
            history.failure, history.pools = error.cause, again
        return None

    async def _on_replica(
        self,
        request: ImageRequest,
        lease: Lease,
        options: StreamOptions,
        on_progress: OnProgress,
        edited: EditPixels | None,
        *,
        alone: bool,
    ) -> ImageResult:
        """Call the granted Generator.

        `alone`: the replica runs no other image at the same time. Raises `NotStarted` if the
        replica did not start the image, or if it cancelled the image by itself. Raises `NotSent` if
        this node has no room for the picture. Raises an error of `REPLICA_LOST` if a replica died
        after it had started the image. Raises `RayTaskError` if the Generator itself raised an
        error.
        """
        generate = self._pool_handle(lease.pool).generate
        # During an update there may be replicas that know no edits.
        arguments = request, lease, options, alone, *((edited,) if edited else ())
        stream = self._context.copy().run(generate.remote, *arguments)
        started = False
        try:
            try:
                async with asyncio.timeout(self._timing.receive_s) as limit:
                    first = await anext(stream)
            except TimeoutError:
                if not limit.expired():
                    raise  # the error was raised by the replica
                stream.cancel()
                raise NotStarted from None
            except NO_ROOM:
                if edited is None:
                    raise
                raise NotSent from None
            if first is Acknowledgement.REFUSED:
                raise NotStarted
            async for item in stream:
                if isinstance(item, ImageResult):
                    return item
                if item is Acknowledgement.STARTED:
                    started = True
                else:
                    on_progress(item)
        except asyncio.CancelledError:
            stream.cancel()  # else the replica would go on in a slot that counts as free
            if (task := asyncio.current_task()) and not task.cancelling():
                raise NotStarted from None  # the replica gave the image up, not this task
            raise
        except REPLICA_LOST:
            if not started:  # the replica probably died of something else
                raise NotStarted(died=True) from None
            raise
        raise OctetError("a replica ended without an image")
