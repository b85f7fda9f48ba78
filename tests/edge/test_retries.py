"""Attempts of the Ingress with failing Generators and the real Dispatcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import ray.exceptions
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
)

from cluster.cost import CostCoefficients
from serve.api.ingress_metrics import IngressMetrics
from serve.dispatch.client.attempts import ATTEMPTS, FREE_RETRIES, Attempts
from serve.dispatch.client.session import DispatchSession
from serve.dispatch.protocol import Heartbeat, Lease, Timing
from serve.edit_pixels import EditPixels
from serve.errors import (
    InvalidRequest,
    NonFiniteImage,
    OctetError,
    ReplicaFailed,
    StoreFailed,
    Unavailable,
)
from serve.ray_errors import REPLICA_LOST
from serve.request import (
    Acknowledgement,
    ImageRequest,
    ImageResult,
    Precision,
    StreamOptions,
)
from serve.settings.application import Settings

from ..builders import image_request, image_result
from ..in_process import PROMPT, Client, Handle, a_dispatcher

REQUEST = image_request(model="landscapes", num_inference_steps=1, guidance_scale=1.0)


class Generator:
    """Raises `failures` one after another, then generates images; keeps the requests it got.

    The first `never_received` calls get no answer, and after those the first `dies_before_start`
    calls lose their replica before the image begins. `no_room`: an error of sending the call.
    """

    def __init__(
        self,
        precision: str,
        *failures: Exception,
        takes_s: float = 0,
        never_received: int = 0,
        dies_before_start: int = 0,
        no_room: Exception | None = None,
    ) -> None:
        self.precision, self.failures = precision, list(failures)
        self.requests: list[ImageRequest] = []
        self.takes_s, self.never_received, self.dies_before_start = (
            takes_s,
            never_received,
            dies_before_start,
        )
        self.alone: list[bool] = []
        self.edited: list[EditPixels | None] = []
        self.no_room = no_room

    @property
    def calls(self) -> int:
        return len(self.requests)

    async def generate(
        self,
        request: ImageRequest,
        _: Lease,
        options: StreamOptions,
        alone: bool,
        edited: EditPixels | None = None,
    ) -> AsyncIterator[Acknowledgement | ImageResult]:
        self.requests.append(request)
        self.edited.append(edited)
        self.alone.append(alone)
        if self.no_room:
            raise self.no_room
        if self.calls <= self.never_received:
            await asyncio.sleep(60)  # the grant was for a replica that has gone
        yield Acknowledgement.RECEIVED
        if self.calls <= self.dies_before_start:
            raise ActorDiedError  # before the image began
        yield Acknowledgement.STARTED
        if self.failures:
            raise self.failures.pop(0)
        await asyncio.sleep(self.takes_s)
        yield image_result(seed=request.seed, precision=self.precision)


def as_task_error(cause: Exception) -> Exception:
    """An exception of a replica as Ray hands it to the caller."""
    error: Exception = RayTaskError("generate", "traceback", cause).as_instanceof_cause()
    return error


def generate(
    settings: Settings,
    fp8: Generator,
    fp16: Generator,
    precision: Precision = Precision.AUTO,
    abandon_after_s: float = 5,
    alive: tuple[str, ...] = ("landscapes-fp8", "landscapes-fp16"),
    placeable: bool = True,
    timing: Timing = PROMPT,
    edited: EditPixels | Callable[[], Awaitable[EditPixels]] | None = None,
) -> ImageResult:
    async def main() -> ImageResult:
        generators = {"landscapes-fp8": fp8, "landscapes-fp16": fp16}
        quick = replace(timing, replica_lease_s=0.05)
        dispatcher = a_dispatcher(*generators, nodes=None if placeable else [], timing=quick)
        await asyncio.sleep(0.01)  # the nodes have been read

        async def beat() -> None:
            """Report the replicas again and again, also after their deaths."""
            while True:
                for pool in alive:
                    await dispatcher.report_replica(Heartbeat(pool, "r", 1))
                await asyncio.sleep(0.01)

        beating = asyncio.create_task(beat())
        await asyncio.sleep(0)
        handles = {pool: Handle(generator) for pool, generator in generators.items()}
        work = {model.id: CostCoefficients(1, 0, 0, 0, 0) for model in settings.models}
        attempts = Attempts(handles.__getitem__, IngressMetrics(), timing)
        attempts.set_models(settings.models, work)
        request = replace(REQUEST, precision=precision)
        images = [attempts.queued_image(request, StreamOptions())]
        session = DispatchSession(Handle(dispatcher), timing)
        async with asyncio.timeout(5):
            call = session.open("anonymous", "id", images, 60, Client())
            try:
                await call.admitted()
                async with asyncio.timeout(abandon_after_s) as limit:
                    result, usage = await attempts.generate(request, call, edited=edited)
                    assert usage.precision == ("fp8" if result.precision == "fp8" else "fp16")
                    assert usage.work_s == 1
                    return result
            except TimeoutError:
                if not limit.expired():
                    raise
                (stream,) = handles["landscapes-fp8"].streams
                assert stream.broken.is_set()  # the replica was asked to stop
                raise
            finally:
                call.close()
                # Every slot comes back, though not at once if the replica has refused an image.
                free = dispatcher.grants.free_slots
                while {free(pool) for pool in alive} != {1}:  # noqa: ASYNC110 - no event tells it
                    await asyncio.sleep(0.01)
                beating.cancel()

    return asyncio.run(main())


def test_every_attempt_gets_the_picture_of_an_edit(laptop: Settings) -> None:
    picture = EditPixels(np.zeros((64, 64, 3), np.uint8))
    fp8, fp16 = Generator("fp8", ActorDiedError()), Generator("bf16")
    generate(laptop, fp8, fp16, edited=picture)
    assert [*fp8.edited, *fp16.edited] == [picture, picture]


def test_a_picture_is_read_once_for_all_attempts(laptop: Settings) -> None:
    picture, read = EditPixels(np.zeros((64, 64, 3), np.uint8)), 0

    async def pictures() -> EditPixels:
        nonlocal read
        read += 1
        return picture

    fp8, fp16 = Generator("fp8", ActorDiedError()), Generator("bf16")
    generate(laptop, fp8, fp16, edited=pictures)
    assert [*fp8.edited, *fp16.edited] == [picture, picture]
    assert read == 1


def test_a_picture_that_cannot_be_read_gives_the_slot_back(laptop: Settings) -> None:
    async def pictures() -> EditPixels:
        raise StoreFailed("the bucket is away")

    with pytest.raises(StoreFailed):
        generate(laptop, Generator("fp8"), Generator("fp16"), edited=pictures)


@pytest.mark.parametrize("error", [ObjectStoreFullError(""), OutOfDiskError("")])
def test_a_picture_for_which_there_is_no_room_is_not_blamed_on_its_request(
    laptop: Settings, error: Exception
) -> None:
    picture = EditPixels(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(Unavailable, match="no memory left to send the picture") as caught:
        generate(laptop, Generator("fp8", no_room=error), Generator("fp16"), edited=picture)
    assert not isinstance(caught.value, ReplicaFailed)
    # Without a picture the replica's own node is meant.
    assert generate(laptop, Generator("fp8", no_room=error), Generator("fp16")).precision == "fp16"


def test_a_lost_replica_is_tried_again(laptop: Settings) -> None:
    fp8 = Generator("fp8", ActorDiedError(), OutOfMemoryError(""))
    result = generate(laptop, fp8, Generator("bf16"), Precision.FP8)
    assert result.precision == "fp8"
    assert fp8.requests == [replace(REQUEST, precision=Precision.FP8)] * 3  # hence the same picture


# Errors that no call of a replica's method raises in its caller, or that another attempt repeats.
NOT_LOST = {
    ray.exceptions.ActorAlreadyExistsError,  # names of actors
    ray.exceptions.ActorHandleNotFoundError,
    ray.exceptions.ActorPlacementGroupRemoved,  # placement groups, which Octet does not use
    ray.exceptions.TaskPlacementGroupRemoved,
    ray.exceptions.ActorUnschedulableError,  # the start of a replica, which Ray Serve watches
    ray.exceptions.RuntimeEnvSetupError,
    ray.exceptions.TaskUnschedulableError,  # tasks; an actor's methods are none
    ray.exceptions.AsyncioActorExit,  # raised in the replica itself
    ray.exceptions.AuthenticationError,  # as wrong for every replica
    ray.exceptions.CrossLanguageError,  # Java and C++
    ray.exceptions.GetTimeoutError,  # `ray.get` with a timeout
    ray.exceptions.ObjectRefStreamEndOfStreamError,  # the end of a stream, which iteration handles
    ray.exceptions.OufOfBandObjectRefSerializationException,  # an error in our own code
    ray.exceptions.PendingCallsLimitExceeded,  # a limit that Octet does not set
    ray.exceptions.PlasmaObjectNotAvailable,  # `ray.get` inside Ray
    ray.exceptions.RayTaskError,  # an error of the Generator's own code
    ray.exceptions.TaskCancelledError,  # the call was cancelled
    ray.exceptions.UnserializableException,  # as wrong for every replica
    ray.exceptions.UserCodeException,
}


def all_below(error: type[Exception]) -> Iterator[type[Exception]]:
    for below in error.__subclasses__():
        if below.__module__ == "ray.exceptions":
            yield below
            yield from all_below(below)


def test_every_error_of_ray_is_known() -> None:
    """An error that a new version of Ray adds has to be put among one or the other."""
    unknown = {
        error.__name__
        for error in all_below(ray.exceptions.RayError)
        if not issubclass(error, (*REPLICA_LOST, *NOT_LOST))
    }
    assert not unknown


def test_an_image_that_is_lost_with_its_node_is_generated_again(laptop: Settings) -> None:
    fp8 = Generator("fp8", ObjectLostError("00", None, ""), OwnerDiedError("00", None, ""))
    assert generate(laptop, fp8, Generator("bf16"), Precision.FP8).precision == "fp8"
    assert fp8.calls == 3


def test_another_pool_is_tried_before_the_one_that_was_lost(laptop: Settings) -> None:
    fp8, fp16 = Generator("fp8", ActorDiedError()), Generator("bf16")
    assert generate(laptop, fp8, fp16).precision == "bf16"
    assert (fp8.calls, fp16.calls) == (1, 1)


def test_a_request_that_kills_replicas_does_not_loop(laptop: Settings) -> None:
    fp8 = Generator("fp8", *(ActorDiedError() for _ in range(9)))
    with pytest.raises(ReplicaFailed):
        generate(laptop, fp8, Generator("bf16"), Precision.FP8)
    assert fp8.alone == [False, False, True]  # the last attempt runs alone and harms no other image


def test_a_request_that_had_not_begun_is_not_blamed_for_a_lost_replica(laptop: Settings) -> None:
    fp8 = Generator("fp8", dies_before_start=FREE_RETRIES)
    assert generate(laptop, fp8, Generator("bf16"), Precision.FP8).precision == "fp8"
    assert fp8.alone == [False] * (FREE_RETRIES + 1)


def test_a_request_that_kills_too_fast_to_say_so_does_not_loop_either(laptop: Settings) -> None:
    fp8 = Generator("fp8", dies_before_start=99)
    with pytest.raises(ReplicaFailed):
        generate(laptop, fp8, Generator("bf16"), Precision.FP8)
    assert fp8.alone == [False] * (FREE_RETRIES + 2) + [True]


def test_a_non_finite_image_is_generated_again_in_16_bit(laptop: Settings) -> None:
    fp8 = Generator("fp8", as_task_error(NonFiniteImage("nan")))
    result = generate(laptop, fp8, Generator("bf16"))
    assert (result.precision, fp8.calls) == ("bf16", 1)


def test_non_finite_in_16_bit_too_is_an_error(laptop: Settings) -> None:
    fp16 = Generator("bf16", *(as_task_error(NonFiniteImage("nan")) for _ in range(9)))
    with pytest.raises(NonFiniteImage):
        generate(laptop, Generator("fp8", as_task_error(NonFiniteImage("nan"))), fp16)
    assert fp16.calls == 1


def test_non_finite_without_a_16_bit_replica_is_not_worth_asking_again(laptop: Settings) -> None:
    fp8 = Generator("fp8", as_task_error(NonFiniteImage("nan")))
    with pytest.raises(NonFiniteImage):
        generate(laptop, fp8, Generator("bf16"), alive=("landscapes-fp8",), placeable=False)


def test_a_non_finite_image_is_not_repeated_in_the_same_pool(laptop: Settings) -> None:
    fp16 = Generator("bf16", *(as_task_error(NonFiniteImage("nan")) for _ in range(9)))
    with pytest.raises(NonFiniteImage):
        generate(laptop, Generator("fp8"), fp16, alive=("landscapes-fp16",))
    assert fp16.calls == 1


@pytest.mark.parametrize("cause", [Unavailable("no"), OctetError("no")])
def test_typed_errors_pass_through(laptop: Settings, cause: OctetError) -> None:
    fp8 = Generator("fp8", as_task_error(cause))
    with pytest.raises(type(cause)) as caught:
        generate(laptop, fp8, Generator("bf16"))
    assert type(caught.value) is type(cause)
    assert fp8.calls == 1


@pytest.mark.parametrize("cause", [ZeroDivisionError, TimeoutError])
def test_nothing_else_is_retried(laptop: Settings, cause: type[Exception]) -> None:
    fp8 = Generator("fp8", as_task_error(cause()))
    with pytest.raises(cause):
        generate(laptop, fp8, Generator("bf16"))
    assert fp8.calls == 1


def test_an_abandoned_image_is_stopped_before_its_slot_is_free(laptop: Settings) -> None:
    with pytest.raises(TimeoutError):
        generate(laptop, Generator("fp8", takes_s=60), Generator("bf16"), abandon_after_s=0.2)


def test_without_a_16_bit_pool_a_non_finite_image_is_an_error(laptop: Settings) -> None:
    model = laptop.models[0]
    fp8_only = laptop.model_copy(
        update={"models": (model.model_copy(update={"pools": model.pools[:1]}),)}
    )
    with pytest.raises(NonFiniteImage):
        generate(
            fp8_only, Generator("fp8", as_task_error(NonFiniteImage("nan"))), Generator("bf16")
        )
    with pytest.raises(InvalidRequest, match="served in fp8"):
        generate(fp8_only, Generator("fp8"), Generator("bf16"), Precision.FP16)


def test_a_grant_that_no_replica_takes_up_is_given_back_and_asked_for_again(
    laptop: Settings,
) -> None:
    fp8 = Generator("fp8", never_received=ATTEMPTS + 1)
    quick = replace(PROMPT, receive_s=0.1)
    found = generate(laptop, fp8, Generator("bf16"), Precision.FP8, timing=quick)
    assert found.precision == "fp8"
    assert fp8.calls == ATTEMPTS + 2  # such calls do not count as attempts
