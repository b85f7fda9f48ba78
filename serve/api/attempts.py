"""One image, from the queue to its bytes, on a replica that survives it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException

from cluster.cost import CostCoefficients

from ..dispatch.client.open_call import HeldSlot, OpenCall, Wish
from ..dispatch.protocol import REPLICA_LEASE_S, Lease, Pools
from ..errors import (
    InvalidRequest,
    NoCapacity,
    NonFiniteImage,
    OctetError,
    ReplicaFailed,
    Unavailable,
)
from ..models.reference_work import shape_of
from ..ray_errors import REPLICA_LOST
from ..request import (
    Acknowledgement,
    ImageRequest,
    ImageResult,
    PartialImage,
    Precision,
    Progress,
    StreamOptions,
)
from ..settings.models import ServedModel
from ..usage.record import UsageRecord
from .ingress_metrics import IngressMetrics

log = logging.getLogger("ray.serve")

ATTEMPTS = 3  # a request whose replica dies is tried twice more, then it counts as the cause
SPARED = 3  # deaths of replicas before they began with a request, which are not counted as its own
PAUSE_S = 0.25
TAKE_S = REPLICA_LEASE_S  # a replica that has not taken it by then is gone, or on its way out


Tell = Callable[[Progress | PartialImage], None]
GeneratedImage = tuple[ImageResult, UsageRecord]


class NotStarted(Exception):
    """No replica of the granted pool drew any of it, or it gave it up for want of a session.

    `died`: it was lost before it said that it had begun.
    """

    def __init__(self, *, died: bool = False) -> None:
        super().__init__()
        self.died = died


@dataclass(slots=True)
class _Course:
    """What has become of an image so far, and where it may go on."""

    pools: Pools
    lost: int = 0  # attempts that ended with their replica
    spared: int = 0
    failure: OctetError | None = None  # of the one that is drawn again for it


class Attempts:
    """Slots of a call, calls to the Generators, and what follows if one fails."""

    def __init__(
        self,
        models: Iterable[ServedModel],
        work: Mapping[str, CostCoefficients],
        generators: Mapping[str, Any],
        metrics: IngressMetrics,
    ) -> None:
        """`work`: in what each model's requests are counted; `generators`: a handle per pool."""
        # Ray cancels what was submitted in the context of a request whose client has gone, shielded
        # or not; others may wait for the same image, and we end it ourselves.
        self._outside = contextvars.copy_context()
        self._models, self._work = {model.id: model for model in models}, work
        self._generators = generators
        self._precisions = {
            model.pool_name(pool): pool.precision
            for model in self._models.values()
            for pool in model.pools
        }
        self._metrics = metrics

    def wish(self, request: ImageRequest, watch: StreamOptions) -> Wish:
        """What the Dispatcher has to know of an image.

        Raises `InvalidRequest` if the model has no such pool.
        """
        shape = shape_of(request, self._models[request.model].max_sequence_length)
        pools = self._pools(request, request.precision)
        work_s = round(self._work[request.model].work_s(shape), 6)
        return Wish(pools, work_s, watch.progress)

    async def draw(
        self,
        request: ImageRequest,
        call: OpenCall,
        image: int = 0,
        watch: StreamOptions = StreamOptions(),  # noqa: B008 - immutable
        tell: Tell = lambda _: None,
    ) -> GeneratedImage:
        """The image of a call at a place of its wishes, and what it is charged when delivered.

        `tell` hears what `watch` asks for. Raises any `OctetError` that does not refuse a call.
        """
        began = time.monotonic()
        course = _Course(call.opening.entries[image].pools)

        def queued(place: int) -> None:
            tell(Progress(0, request.num_inference_steps, queue_position=place))

        while True:
            try:
                told = queued if watch.progress else None
                async with call.slot(image, course.pools, told) as slot:
                    queue_s = time.monotonic() - began
                    self._metrics.queued(slot.lease.pool, queue_s)
                    try:
                        result = await self._attempt(request, slot, course, watch, tell)
                    except asyncio.CancelledError:
                        if call.client.unwanted and slot.took_s is None:
                            slot.cancelled = self._usage(request, call, image, slot.lease.pool)
                        raise
            except NoCapacity:
                if course.failure:  # and there is no other pool that could do better
                    raise course.failure from None
                raise
            if result:
                timings = replace(result.timings, queue_s=queue_s)
                usage = self._usage(request, call, image, slot.lease.pool)
                call.drawn.append(usage)
                return replace(result, timings=timings), usage

    def _usage(self, request: ImageRequest, call: OpenCall, image: int, pool: str) -> UsageRecord:
        """What a delivered image is charged; `pool`: where it was drawn."""
        work_s = call.opening.entries[image].work_s
        return usage_of(call, image, request, self._precisions[pool], work_s)

    async def _attempt(
        self,
        request: ImageRequest,
        slot: HeldSlot,
        course: _Course,
        watch: StreamOptions,
        tell: Tell,
    ) -> ImageResult | None:
        """An image, or None after what is worth another attempt: `course` then says where."""
        pool, last = slot.lease.pool, course.lost == ATTEMPTS - 1
        try:
            result = await self._on_replica(request, slot.lease, watch, tell, alone=last)
            slot.took_s = result.work_s
            return result
        except (NotStarted, *REPLICA_LOST) as error:
            course.pools = _last(pool, course.pools)
            if isinstance(error, NotStarted):
                slot.took_s = 0.0
            if isinstance(error, NotStarted) and not (error.died and course.spared == SPARED):
                course.spared += error.died
                log.warning("%s: no replica of %s began; queueing again", request.id, pool)
                self._metrics.retried(pool, "not_begun")
                await asyncio.sleep(PAUSE_S)  # a dead replica is granted until it is noticed
                return None
            course.lost += 1
            log.warning("%s: attempt %d lost its replica of %s", request.id, course.lost, pool)
            if last:
                raise ReplicaFailed(f"the replica died in each of {ATTEMPTS} attempts") from None
            self._metrics.retried(pool, "replica_lost")
        except RayServeException:
            slot.took_s = 0.0
            raise Unavailable(f"{pool} cannot be reached") from None
        except RayTaskError as error:
            if not isinstance(error.cause, OctetError):
                raise
            again = self._after(error.cause, request)
            if again in ((), (pool,)):
                raise error.cause from None
            log.warning("%s: %s; drawing it in 16 bit", request.id, error.cause)
            self._metrics.retried(pool, "non_finite")
            course.failure, course.pools = error.cause, again
        return None

    async def _on_replica(
        self, request: ImageRequest, lease: Lease, watch: StreamOptions, tell: Tell, *, alone: bool
    ) -> ImageResult:
        """Raises `NotStarted`, or after it has begun what `REPLICA_LOST` has and `RayTaskError`."""
        generate = self._generators[lease.pool].generate
        stream = self._outside.copy().run(generate.remote, request, lease, watch, alone)
        begun = False
        try:
            try:
                async with asyncio.timeout(TAKE_S) as limit:
                    await anext(stream)
            except TimeoutError:
                if not limit.expired():
                    raise  # the replica's own
                stream.cancel()
                raise NotStarted from None
            async for item in stream:
                if isinstance(item, ImageResult):
                    return item
                if item is Acknowledgement.BEGUN:
                    begun = True
                else:
                    tell(item)
        except asyncio.CancelledError:
            stream.cancel()  # else the replica draws on in a slot that counts as free
            if (task := asyncio.current_task()) and not task.cancelling():
                raise NotStarted from None  # the replica gave it up, and we did not
            raise
        except REPLICA_LOST:
            if not begun:  # it died of something else, if this does not happen too often
                raise NotStarted(died=True) from None
            raise
        raise OctetError("a replica ended without an image")

    def _pools(self, request: ImageRequest, precision: Precision) -> Pools:
        """The pools a request may run in, preferred first."""
        model = self._models[request.model]
        pools = tuple(
            model.pool_name(pool)
            for pool in model.pools
            if precision in (Precision.AUTO, pool.precision)
        )
        if not pools:
            there = ", ".join(dict.fromkeys(pool.precision for pool in model.pools))
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


def usage_of(
    call: OpenCall, image: int, request: ImageRequest, precision: str, work_s: float
) -> UsageRecord:
    """What is recorded of one image of a call."""
    opening = call.opening
    return UsageRecord(
        call=opening.call,
        image=image,
        tenant=opening.tenant,
        request_id=opening.request_id,
        model=request.model,
        precision=precision,
        size=request.size,
        steps=request.num_inference_steps,
        work_s=work_s,
    )


def _last(pool: str, pools: Pools) -> Pools:
    """The same pools, one of them last: its replicas may all be gone."""
    return (*(p for p in pools if p != pool), pool)
