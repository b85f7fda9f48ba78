"""The Generator deployment: one replica generates the images of one pool.

The denoising loop's threads run the model, and another thread encodes image files. So the event
loop is always free for heartbeats and cancellations.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ray.serve.exceptions import RayServeException

from cluster.capability import Capability, capability, probe
from cluster.cards import card_of_device
from cluster.cost import UNKNOWN_GPU, ImageShape, LearnedCost, reference
from cluster.structure import Structure

from ..dispatch.protocol import TIMING, Heartbeat, Lease, StoppedImage
from ..edit_pixels import EditPixels
from ..errors import NonFiniteImage, OctetError, Unavailable
from ..models.checkpoints import open_checkpoint
from ..models.reference_work import cost_of, shape_of
from ..ray_errors import REPLICA_LOST
from ..request import (
    SHADOW,
    Acknowledgement,
    ImageRequest,
    ImageResult,
    PartialImage,
    Progress,
    StreamOptions,
    Timings,
)
from ..settings.models import Pool
from ..settings.serve_config import LivePoolSettings, PoolArguments
from . import BEGAN
from .apart import apart
from .card import device_for, share_card, take_card
from .denoiser import DENOISER_COMPONENTS, Denoiser
from .denoising_loop import DenoisingLoop, GeneratedPixels, PreviewPixels, StepDone
from .exclusive import SharedExclusiveLock
from .generator_metrics import GeneratorMetrics
from .image_file import encode_image
from .precision import RECIPES, Recipe, fp8_fault
from .prompt_embeds import PromptEmbeds
from .reporting import Reporting
from .warm_up import Phases, WarmUp, warm_sizes

log = logging.getLogger("ray.serve")

IMPORT_S = time.monotonic() - BEGAN  # what loading torch and diffusers took this process
FILE_THREADS = 2  # that encode image files, beside the thread of the denoising loop

ENCODER_ATTEMPTS = 3
ENCODER_PAUSE_S = 0.5  # between two attempts to reach the text encoder
WARM_UP = "warm-up"
USUAL_STEPS = 28  # steps of the image by which a new replica's speed is estimated
PROGRESS_S = 0.1  # between two progress events of an image, at least

StreamItem = Progress | PartialImage


def choose_recipe(pool: Pool, device: Capability) -> Recipe:
    """Choose the number formats of a pool on a device.

    Raises `OctetError` if the pool is an FP8 pool and the device cannot compute in FP8.
    """
    if pool.precision == "fp8":
        if device.fp8 == "none":
            raise OctetError(f"an FP8 pool cannot run here: {device.reason}")
        return RECIPES["fp8-adaln8" if pool.adaln_8_bit else "fp8"]
    return RECIPES[device.sixteen_bit]


def _own_ids() -> tuple[str, str]:
    """The ids of the replica that this process is, and of its node."""
    import ray
    from ray import serve  # the contexts exist only inside a replica

    replica: str = serve.get_replica_context().replica_id.unique_id
    return replica, ray.get_runtime_context().get_node_id()


@dataclass(slots=True)
class _ImageCall:
    """One call of `generate`: its image, and the events that are to be streamed.

    `shape`: the sizes on which the image's work depends. `edited`: an edit's picture and mask.
    `owner`: whose image it is, as its lease says.
    `step`: the number of steps that are done.
    """

    request: ImageRequest
    options: StreamOptions
    events: asyncio.Queue[Acknowledgement | StepDone | PreviewPixels | None]
    shape: ImageShape
    edited: EditPixels | None = None
    owner: str = ""
    step: int = 0
    done: bool = False
    task: asyncio.Task[ImageResult] | None = None


class Generator:
    """A replica that generates images: one for each call, several calls at the same time.

    The replica reports its state to the Dispatcher by heartbeat.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self, arguments: dict[str, Any], text_encoder: Any, dispatcher: Any
    ) -> None:
        """`arguments`: the fields of a `PoolArguments`; the others are Ray Serve handles."""
        began = time.monotonic()
        self._replica, self._node = _own_ids()
        given = PoolArguments.model_validate(arguments)
        self._name, self._model, self._pool = given.name, given.model, given.pool
        self._models_folder = given.models_folder
        self._local_models_folder = given.local_models_folder
        self._text_encoder, self._dispatcher = text_encoder, dispatcher
        await asyncio.to_thread(share_card, self._pool, given.mps_folder)
        device = probe(device_for(self._pool))
        found = capability(device, allow_emulated_fp8=given.emulate_fp8)
        self._recipe = choose_recipe(self._pool, found)
        self._emulated = self._recipe.fp8_linears and found.fp8 == "emulated"
        self._text_tokens = self._model.max_sequence_length  # until the encoder says how many
        self._file_threads = ThreadPoolExecutor(FILE_THREADS)
        self._lock = SharedExclusiveLock()
        self._running: dict[Lease, _ImageCall] = {}
        self._stopped: list[StoppedImage] = []  # not yet reported
        self._orphans: dict[Lease, float] = {}  # leases that no session holds, and since when
        self._careful = False  # the card has had a fault: one image at a time
        phases = Phases()
        phases.seconds["import"] = IMPORT_S
        self._card = await asyncio.to_thread(take_card, self._pool)
        if self._recipe.fp8_linears and (
            fault := await apart(lambda: fp8_fault(device_for(self._pool)))
        ):
            raise OctetError(f"an FP8 pool cannot run on {device.name}: {fault}")
        self._denoiser = await apart(lambda: self._load(phases))
        warm_up = WarmUp(self._denoiser, self._pool, given.compiled_folder)
        warm_up.prepare()
        self._denoising = DenoisingLoop(
            self._denoiser,
            max_rows=2 * self._pool.slots,
            # Exit at once: the calls of a dead replica are repeated elsewhere, but those of a stuck
            # replica would wait.
            on_broken=lambda: os._exit(1),
        )
        card = card_of_device(device.name, device.memory_gib) or UNKNOWN_GPU
        self._cost = LearnedCost(
            reference(
                Structure.of(self._denoiser.transformer.config),
                self._recipe.name,
                card if device.compute_capability else None,
            ),
            usual=replace(self._warm_up_call().shape, steps=USUAL_STEPS),
        )
        self._metrics = GeneratorMetrics(self._name)
        with phases.timed("text"):
            embeds = await self._embed(self._warm_up_request())
        attention = await asyncio.to_thread(warm_up.run, self._denoising, embeds, phases)
        with phases.timed("warm-up"):
            await self._result(self._warm_up_call())
        log.info("ready after %s; attention: %s", phases, attention)
        self._metrics.started(phases.seconds)
        self._start_s = time.monotonic() - began
        self._reporting = Reporting()
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the unit of work from the model's present reference pool.

        Ray Serve calls this before the first image, and whenever a `LivePoolSettings` changes. The
        first call also begins the heartbeats.
        """
        pool = LivePoolSettings.model_validate(user_config).reference
        self._cost.unit = cost_of(self._model, pool, self._models_folder)
        if not self._tasks:
            coroutines = self._report(), self._notice_restarts()
            self._tasks = tuple(asyncio.create_task(one) for one in coroutines)

    async def generate(
        self,
        request: ImageRequest,
        lease: Lease,
        options: StreamOptions,
        alone: bool,
        edited: EditPixels | None = None,
    ) -> AsyncIterator[Acknowledgement | StreamItem | ImageResult]:
        """Generate an image; yield the two acknowledgements, progress, and the finished image.

        Progress and previews are yielded only if `options` ask for them. `alone`: wait until no
        other image runs on this replica, and let none start. `edited`: an edit's picture and mask.
        Raises `NonFiniteImage` if the result holds non-finite numbers. Raises `Unavailable` if
        memory or the text encoder is missing.

        A replica that the lease does not name yields only a refusal: Ray Serve sends an image to it
        when the named one is gone.

        Closing the stream stops the image before its next step. A caller that was killed cannot
        close the stream, so the image is also stopped when no session holds its lease any more.
        """
        if lease.replica != self._replica:
            yield Acknowledgement.REFUSED
            return
        yield Acknowledgement.RECEIVED
        call = self._new_call(request, options, edited, lease.owner)
        call.task = asyncio.create_task(self._in_turn(call, alone or self._careful))
        call.task.add_done_callback(lambda _: call.events.put_nowait(None))
        self._running[lease] = call
        try:
            async for item in self._stream(call):
                yield item
            result = await call.task
            call.done = True
        except NonFiniteImage:
            self._ended(call, "non_finite")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._ended(call, "cancelled")
            raise
        except Exception:  # counted here, answered by the Ingress
            self._ended(call, "failed")
            raise
        finally:
            call.task.cancel()
            del self._running[lease]
            if not call.done:
                done = replace(call.shape, steps=call.step)
                took_s = self._cost.unit.work_s(done) if call.step else 0.0
                self._stopped.append(StoppedImage(lease, call.step, took_s))
        if request.id != SHADOW:
            self._metrics.generated(result.timings)
        log.info("generated %s", request.id)
        yield result

    async def check_health(self) -> None:
        """Raise `RuntimeError` if the card is broken; called by Ray Serve.

        Also raises it if the tasks of the heartbeat or the denoising loop have ended.
        """
        if self._card:
            await asyncio.to_thread(self._card.check)
        if any(task.done() for task in self._tasks) or not self._denoising.alive:
            raise RuntimeError("the heartbeat or the denoising loop has stopped")

    # -- one image ------------------------------------------------------------------------------

    def _ended(self, call: _ImageCall, outcome: str) -> None:
        """Count an image that was not generated; shadows are not counted."""
        if call.request.id != SHADOW:
            self._metrics.ended(outcome)

    def _new_call(
        self,
        request: ImageRequest,
        options: StreamOptions,
        edited: EditPixels | None = None,
        owner: str = "",
    ) -> _ImageCall:
        shape = shape_of(request, self._text_tokens)
        return _ImageCall(request, options, asyncio.Queue(), shape, edited, owner)

    async def _in_turn(self, call: _ImageCall, alone: bool) -> ImageResult:
        async with self._lock.held(exclusively=alone):
            call.events.put_nowait(Acknowledgement.STARTED)
            return await self._result(call)

    async def _result(self, call: _ImageCall) -> ImageResult:
        """Generate an image: encode the prompt, denoise, decode, and encode the image file."""
        request = call.request
        began = time.monotonic()
        embeds = await self._embed(request)
        text_s = time.monotonic() - began
        self._text_tokens = embeds.tokens.shape[1]
        call.shape = replace(call.shape, text_tokens=self._text_tokens)
        # Cancelling this coroutine cancels the future, which the loop sees before its next step.
        generation = self._denoising.generate(
            request,
            embeds,
            call.options.partial_images,
            self._event_sender(call),
            call.edited,
            call.owner,
        )
        generated: GeneratedPixels = await asyncio.wrap_future(generation)
        file, encode_s = await self._file(generated.pixels, request)
        if request.id != WARM_UP:
            self._cost.observe(call.shape, generated.busy_s)
        return ImageResult(
            image=file,
            seed=request.seed,
            precision=self._recipe.name,
            emulated=self._emulated,
            text_tokens=call.shape.text_tokens,
            work_s=generated.busy_s * self._cost.speed,
            timings=Timings(
                text_s=text_s,
                latents_s=generated.latents_s,
                denoise_s=generated.denoise_s,
                decode_s=generated.decode_s,
                encode_s=encode_s,
            ),
        )

    def _event_sender(self, call: _ImageCall) -> Callable[[StepDone | PreviewPixels], None]:
        """Return a function by which the denoising loop's threads pass events to the event loop.

        The events of steps are passed only if the options ask for progress, and then at most one
        in `PROGRESS_S` seconds, but always the last.
        """
        event_loop = asyncio.get_running_loop()
        last_sent_s = 0.0

        def send(event: StepDone | PreviewPixels) -> None:
            nonlocal last_sent_s
            if isinstance(event, StepDone):
                call.step = event.step
                last = event.step == call.shape.steps
                soon = event.denoise_s - last_sent_s < PROGRESS_S
                if not call.options.progress or (soon and not last):
                    return
                last_sent_s = event.denoise_s
            event_loop.call_soon_threadsafe(call.events.put_nowait, event)

        return send

    async def _stream(self, call: _ImageCall) -> AsyncIterator[Acknowledgement | StreamItem]:
        """Yield an image's start, and the progress and previews that its options ask for."""
        steps = call.shape.steps
        while (event := await call.events.get()) is not None:
            if isinstance(event, Acknowledgement):
                yield event
                if call.options.progress:
                    yield Progress(0, steps, self._cost.coefficients.work_s(call.shape))
            elif isinstance(event, PreviewPixels):
                file, _ = await self._file(event.pixels, call.request)
                yield PartialImage(event.index, file)
            else:
                pace = event.denoise_s / event.step
                decode_s = self._cost.coefficients.pixel * call.shape.pixels
                yield Progress(event.step, steps, (steps - event.step) * pace + decode_s)

    async def _file(self, pixels: Any, request: ImageRequest) -> tuple[bytes, float]:
        """Encode pixels (height_px, width_px, 3); returns the file and the seconds that it took."""

        def encode() -> tuple[bytes, float]:
            began = time.monotonic()
            file = encode_image(pixels, request, self._recipe.name)
            return file, time.monotonic() - began

        return await asyncio.get_running_loop().run_in_executor(self._file_threads, encode)

    async def _embed(self, request: ImageRequest) -> PromptEmbeds:
        """Encode the request's prompts.

        Returns one row; with guidance two rows, of which the negative prompt's is the first. Raises
        `Unavailable` if the text encoder cannot be reached in any of several attempts.
        """
        prompts = [request.negative_prompt] if request.guided else []
        for attempt in range(1, ENCODER_ATTEMPTS + 1):
            try:
                embeds: PromptEmbeds = await self._text_encoder.encode.remote(
                    [*prompts, request.prompt], self._model.max_sequence_length
                )
            except (*REPLICA_LOST, RayServeException):
                log.warning("%s: attempt %d lost the text encoder", request.id, attempt)
                await asyncio.sleep(ENCODER_PAUSE_S)
            else:
                return embeds
        raise Unavailable(f"the text encoder was lost in each of {ENCODER_ATTEMPTS} attempts")

    # -- the replica ----------------------------------------------------------------------------

    def _load(self, phases: Phases) -> Denoiser:
        source = self._pool.source or self._model.source
        folder = open_checkpoint(
            source,
            self._models_folder,
            DENOISER_COMPONENTS,
            self._local_models_folder,
            phases.timed,
        )
        with phases.timed("load"):
            return Denoiser.load(folder, self._recipe, device_for(self._pool))

    def _warm_up_call(self) -> _ImageCall:
        return self._new_call(self._warm_up_request(), StreamOptions())

    def _warm_up_request(self) -> ImageRequest:
        """A request with one step, so that everything has run once before the first client comes.

        The request uses the text encoder, the transformer's kernels and the VAE.
        """
        width, height = warm_sizes(self._pool, self._denoiser.native_size_px)[0]
        return ImageRequest(
            id=WARM_UP,
            model=self._model.id,
            prompt="warm-up",
            width=width,
            height=height,
            num_inference_steps=1,
            guidance_scale=2.0,
            seed=0,
        )

    def _heartbeat_message(self) -> Heartbeat:
        """The heartbeat with this replica's present state.

        While an image runs alone, or waits to do so, the replica reports no free slot. Shadows do
        not count: they are stopped when anything else needs the replica.
        """
        running = [call for call in self._running.values() if call.request.id != SHADOW]
        work_s = sum(
            self._cost.coefficients.work_s(replace(c.shape, steps=c.shape.steps - c.step))
            for c in running
        )
        return Heartbeat(
            pool=self._name,
            replica=self._replica,
            slots=len(self._running) if self._lock.exclusive else self._pool.slots,
            running_work_s=work_s,
            speed=self._cost.speed,
            node=self._node,
            start_s=self._start_s,
            card=self._card.uuid if self._card else "",
            fault=self._card.fault if self._card else "",
        )

    async def _report(self) -> None:
        """Send heartbeats to the Dispatcher as long as the denoising loop runs."""
        while self._denoising.alive:
            heartbeat, stopped = self._heartbeat_message(), list(self._stopped)
            if self._reporting.is_due(heartbeat, stopped, time.monotonic()):
                await self._send(heartbeat, stopped)
            self._metrics.report(self._denoising.counts, heartbeat.speed, self._cost.coefficients)
            await asyncio.sleep(TIMING.heartbeat_s)

    async def _send(self, heartbeat: Heartbeat, stopped: list[StoppedImage]) -> None:
        before = self._reporting.forgotten_times
        try:
            reply = await self._dispatcher.report_replica.remote(
                heartbeat, list(self._running), stopped
            )
            del self._stopped[: len(stopped)]
            self._careful = reply.one_at_a_time
            now = time.monotonic()
            if self._reporting.forgotten_times == before:  # it is still the same Dispatcher
                self._reporting.told(heartbeat, reply.next_s, now)
            self._drop(reply.orphans, now)
        except Exception:  # go on after any error, because a silent replica counts as lost
            log.warning("could not report to the dispatcher; trying again", exc_info=True)
            self._reporting.forgotten()
            self._orphans.clear()  # sessions get the full time to come back again

    async def _notice_restarts(self) -> None:
        """Report soon to every new Dispatcher."""
        while True:
            with suppress(Exception):  # Ray's errors have no common class
                await self._dispatcher.outlast.remote()
            self._reporting.forgotten()
            await asyncio.sleep(TIMING.heartbeat_s)

    def _drop(self, orphans: Iterable[Lease], now: float) -> None:
        """Stop images whose lease no session has held for `session_lease_s` seconds.

        A session that was lost has this time to come back; shadows are stopped at once. `orphans`:
        the leases that the Dispatcher says no session holds.
        """
        self._orphans = {
            lease: self._orphans.get(lease, now) for lease in map(Lease._make, orphans)
        }
        for lease, since in self._orphans.items():
            call = self._running.get(lease)
            if call and call.task and call.request.id == SHADOW:
                call.task.cancel()
            elif now - since > TIMING.session_lease_s and call and call.task:
                log.warning(
                    "nobody waits for image %s of session %s", lease.image_id, lease.session
                )
                call.task.cancel()
