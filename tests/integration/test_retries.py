"""What the Ingress does when a Generator fails, with the real Dispatcher and failing Generators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from cluster.cost import CostCoefficients
from serve.api import attempts as drawing_module
from serve.api.attempts import ATTEMPTS, SPARED, Attempts
from serve.api.ingress_metrics import IngressMetrics
from serve.dispatch.client.session import DispatchSession
from serve.dispatch.protocol import Heartbeat, Lease
from serve.errors import InvalidRequest, NonFiniteImage, OctetError, ReplicaFailed, Unavailable
from serve.request import (
    Acknowledgement,
    ImageRequest,
    ImageResult,
    Precision,
    StreamOptions,
    Timings,
)
from serve.settings.application import Settings

from ..in_process import Handle, Someone, a_dispatcher

REQUEST = ImageRequest(
    id="1",
    model="landscapes",
    prompt="x",
    width=64,
    height=64,
    num_inference_steps=1,
    guidance_scale=1.0,
    seed=0,
)


class Generator:
    """Fails as told, then draws; remembers how often it was asked."""

    def __init__(
        self,
        precision: str,
        *failures: Exception,
        takes_s: float = 0,
        late: int = 0,
        bystander: int = 0,
    ) -> None:
        self.precision, self.failures, self.calls = precision, list(failures), 0
        self.takes_s, self.late, self.bystander = takes_s, late, bystander
        self.alone: list[bool] = []

    async def generate(
        self, request: ImageRequest, _: Lease, watch: StreamOptions, alone: bool
    ) -> AsyncIterator[Acknowledgement | ImageResult]:
        self.calls += 1
        self.alone.append(alone)
        if self.calls <= self.late:
            await asyncio.sleep(60)  # the grant was for a replica that is no more
        yield Acknowledgement.RECEIVED
        if self.calls <= self.bystander:
            raise ActorDiedError  # before it began with this one
        yield Acknowledgement.STARTED
        if self.failures:
            raise self.failures.pop(0)
        await asyncio.sleep(self.takes_s)
        timings = Timings(text_s=0, denoise_s=0, decode_s=0, encode_s=0)
        yield ImageResult(
            image=b"",
            seed=request.seed,
            precision=self.precision,
            emulated=False,
            text_tokens=77,
            work_s=1.0,
            timings=timings,
        )


def as_task_error(cause: Exception) -> Exception:
    """An exception of a replica as Ray hands it to the caller."""
    return RayTaskError("generate", "traceback", cause).as_instanceof_cause()


def draw(
    settings: Settings,
    fp8: Generator,
    fp16: Generator,
    precision: Precision = Precision.AUTO,
    abandon_after_s: float = 5,
    alive: tuple[str, ...] = ("landscapes-fp8", "landscapes-fp16"),
    placeable: bool = True,
) -> ImageResult:
    async def main() -> ImageResult:
        generators = {"landscapes-fp8": fp8, "landscapes-fp16": fp16}
        dispatcher = a_dispatcher(*generators)
        if not placeable:
            dispatcher._grants.set_placeable(())
            dispatcher._read_nodes = list
        for pool in alive:
            await dispatcher.report_replica(Heartbeat(pool, "r", 1))
        handles = {pool: Handle(generator) for pool, generator in generators.items()}
        work = {model.id: CostCoefficients(1, 0, 0, 0, 0) for model in settings.models}
        drawing = Attempts(settings.models, work, handles, IngressMetrics())
        request = replace(REQUEST, precision=precision)
        wishes = [drawing.wish(request, StreamOptions())]
        session = DispatchSession(Handle(dispatcher))
        async with asyncio.timeout(5):
            call = session.open("anonymous", "id", wishes, 60, Someone())
            try:
                await call.admitted()
                async with asyncio.timeout(abandon_after_s) as limit:
                    result, usage = await drawing.draw(request, call)
                    assert usage.precision == ("fp8" if result.precision == "fp8" else "fp16")
                    assert usage.work_s == 1
                    return result
            except TimeoutError:
                if not limit.expired():
                    raise
                (stream,) = handles["landscapes-fp8"].streams
                assert stream.broken.is_set()  # the replica was told to stop
                raise
            finally:
                call.close()
                await asyncio.sleep(0.05)
                free = [dispatcher._grants.free_slots(pool) for pool in alive]
                assert set(free) == {1}  # whatever happened, every slot came back

    return asyncio.run(main())


def test_a_lost_replica_is_tried_again(laptop: Settings) -> None:
    fp8 = Generator("fp8", ActorDiedError(), OutOfMemoryError(""))
    result = draw(laptop, fp8, Generator("bf16"), Precision.FP8)
    assert (result.precision, fp8.calls) == ("fp8", 3)


def test_another_pool_is_tried_before_the_one_that_was_lost(laptop: Settings) -> None:
    fp8, fp16 = Generator("fp8", ActorDiedError()), Generator("bf16")
    assert draw(laptop, fp8, fp16).precision == "bf16"
    assert (fp8.calls, fp16.calls) == (1, 1)


def test_a_request_that_kills_replicas_does_not_loop(laptop: Settings) -> None:
    fp8 = Generator("fp8", *(ActorDiedError() for _ in range(9)))
    with pytest.raises(ReplicaFailed):
        draw(laptop, fp8, Generator("bf16"), Precision.FP8)
    assert fp8.alone == [False, False, True]  # the last one harms nobody else


def test_who_had_not_begun_is_not_to_blame(laptop: Settings) -> None:
    fp8 = Generator("fp8", bystander=SPARED)
    assert draw(laptop, fp8, Generator("bf16"), Precision.FP8).precision == "fp8"
    assert fp8.alone == [False] * (SPARED + 1)


def test_a_request_that_kills_too_fast_to_say_so_does_not_loop_either(laptop: Settings) -> None:
    fp8 = Generator("fp8", bystander=99)
    with pytest.raises(ReplicaFailed):
        draw(laptop, fp8, Generator("bf16"), Precision.FP8)
    assert fp8.alone == [False] * (SPARED + 2) + [True]


def test_a_non_finite_image_is_drawn_again_in_16_bit(laptop: Settings) -> None:
    fp8 = Generator("fp8", as_task_error(NonFiniteImage("nan")))
    result = draw(laptop, fp8, Generator("bf16"))
    assert (result.precision, fp8.calls) == ("bf16", 1)


def test_non_finite_in_16_bit_too_is_an_error(laptop: Settings) -> None:
    fp16 = Generator("bf16", *(as_task_error(NonFiniteImage("nan")) for _ in range(9)))
    with pytest.raises(NonFiniteImage):
        draw(laptop, Generator("fp8", as_task_error(NonFiniteImage("nan"))), fp16)
    assert fp16.calls == 1


def test_non_finite_without_a_16_bit_replica_is_not_worth_asking_again(laptop: Settings) -> None:
    fp8 = Generator("fp8", as_task_error(NonFiniteImage("nan")))
    with pytest.raises(NonFiniteImage):
        draw(laptop, fp8, Generator("bf16"), alive=("landscapes-fp8",), placeable=False)


def test_the_same_pool_would_draw_the_same_numbers_again(laptop: Settings) -> None:
    fp16 = Generator("bf16", *(as_task_error(NonFiniteImage("nan")) for _ in range(9)))
    with pytest.raises(NonFiniteImage):
        draw(laptop, Generator("fp8"), fp16, alive=("landscapes-fp16",))
    assert fp16.calls == 1


@pytest.mark.parametrize("cause", [Unavailable("no"), OctetError("no")])
def test_typed_errors_pass_through(laptop: Settings, cause: OctetError) -> None:
    fp8 = Generator("fp8", as_task_error(cause))
    with pytest.raises(type(cause)) as caught:
        draw(laptop, fp8, Generator("bf16"))
    assert type(caught.value) is type(cause)
    assert fp8.calls == 1


@pytest.mark.parametrize("cause", [ZeroDivisionError, TimeoutError])
def test_nothing_else_is_retried(laptop: Settings, cause: type[Exception]) -> None:
    fp8 = Generator("fp8", as_task_error(cause()))
    with pytest.raises(cause):
        draw(laptop, fp8, Generator("bf16"))
    assert fp8.calls == 1


def test_an_abandoned_image_is_stopped_before_its_slot_is_free(laptop: Settings) -> None:
    with pytest.raises(TimeoutError):
        draw(laptop, Generator("fp8", takes_s=60), Generator("bf16"), abandon_after_s=0.2)


def test_without_a_16_bit_pool_a_non_finite_image_is_what_it_is(laptop: Settings) -> None:
    model = laptop.models[0]
    fp8_only = laptop.model_copy(
        update={"models": (model.model_copy(update={"pools": model.pools[:1]}),)}
    )
    with pytest.raises(NonFiniteImage):
        draw(fp8_only, Generator("fp8", as_task_error(NonFiniteImage("nan"))), Generator("bf16"))
    with pytest.raises(InvalidRequest, match="served in fp8"):
        draw(fp8_only, Generator("fp8"), Generator("bf16"), Precision.FP16)


def test_a_grant_that_no_replica_takes_up_is_given_back_and_asked_for_again(
    laptop: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing_module, "TAKE_S", 0.1)
    fp8 = Generator("fp8", late=ATTEMPTS + 1)
    assert draw(laptop, fp8, Generator("bf16"), Precision.FP8).precision == "fp8"
    assert fp8.calls == ATTEMPTS + 2  # it is not the request's fault
