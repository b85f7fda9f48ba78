"""The Generator deployment: one replica draws the images of one pool.

The denoising loop's threads own the model and another writes image files, so the event loop is
always free for heartbeats and cancellations.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ray.serve.exceptions import RayServeException

from cluster.capability import Capability, capability, probe
from cluster.cards import card_of_device
from cluster.cost import UNKNOWN_GPU, CostCoefficients, ImageShape, LearnedCost, reference
from cluster.structure import Structure

from ..dispatch.protocol import HEARTBEAT_S, SESSION_LEASE_S, Heartbeat, Lease, StoppedImage
from ..errors import NonFiniteImage, OctetError, Unavailable
from ..models.checkpoints import open_checkpoint
from ..ray_errors import REPLICA_LOST
from ..request import (
    Acknowledgement,
    ImageRequest,
    ImageResult,
    PartialImage,
    Progress,
    StreamOptions,
    Timings,
)
from ..settings.models import Pool, ServedModel
from .card import device_for, take_card
from .denoising_loop import DenoisingLoop, GeneratedPixels, PreviewPixels, StepDone
from .exclusive import SharedExclusiveLock
from .generator_metrics import GeneratorMetrics
from .image_file import encode_image
from .precision import RECIPES, Recipe
from .sd3 import DENOISER_COMPONENTS, Denoiser, PromptEmbeds
from .warm_up import Phases, WarmUp, warm_sizes

log = logging.getLogger("ray.serve")

ENCODER_ATTEMPTS = 3
ENCODER_PAUSE_S = 0.5  # between them
WARM_UP = "warm-up"
USUAL_STEPS = 28  # of an image of the model's own size, by which a replica's speed is foretold
PROGRESS_S = 0.1  # progress is told no more often

Told = Progress | PartialImage


def choose_recipe(pool: Pool, device: Capability) -> Recipe:
    """The recipe that a pool runs on a device. Raises `OctetError` if it has no FP8."""
    if pool.precision == "fp8":
        if device.fp8 == "none":
            raise OctetError(f"an FP8 pool cannot run here: {device.reason}")
        return RECIPES["fp8-adaln8" if pool.adaln_8_bit else "fp8"]
    return RECIPES[device.sixteen_bit]


@dataclass(slots=True)
class _Image:
    """One that is being drawn."""

    request: ImageRequest
    watch: StreamOptions
    events: asyncio.Queue[Acknowledgement | StepDone | PreviewPixels | None]
    shape: ImageShape
    step: int = 0
    done: bool = False
    task: asyncio.Task[ImageResult] | None = None


class Generator:
    """Draws an image a call, several at a time; reports itself to the Dispatcher once it can."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self,
        model: dict[str, Any],
        pool: dict[str, Any],
        emulate_fp8: bool,
        work: Sequence[float],
        models_folder: str | None,
        compiled_folder: str | None,
        text_encoder: Any,
        dispatcher: Any,
    ) -> None:
        began = time.monotonic()
        self._model, self._pool = ServedModel.model_validate(model), Pool.model_validate(pool)
        self._models_folder, self._work = models_folder, CostCoefficients(*work)
        self._text_encoder, self._dispatcher = text_encoder, dispatcher
        device = probe(device_for(self._pool))
        found = capability(device, allow_emulated_fp8=emulate_fp8)
        self._recipe = choose_recipe(self._pool, found)
        self._emulated = self._recipe.fp8_linears and found.fp8 == "emulated"
        self._text_tokens = self._model.max_sequence_length  # until the encoder says how many
        self._file_thread = ThreadPoolExecutor(1)
        self._room = SharedExclusiveLock()
        self._drawing: dict[Lease, _Image] = {}
        self._stopped: list[StoppedImage] = []  # not yet told
        self._orphans: dict[Lease, float] = {}  # leases that nobody holds, and since when
        self._leaving = False  # the node is being drained
        phases = Phases()
        self._card = await asyncio.to_thread(take_card, self._pool)
        self._denoiser = await asyncio.to_thread(self._load, phases)
        warm_up = WarmUp(self._denoiser, self._pool, compiled_folder)
        warm_up.prepare()
        self._denoising = DenoisingLoop(
            self._denoiser,
            max_rows=2 * self._pool.slots,
            # At once: callers of a dead replica are served elsewhere, of a stuck one they wait.
            broken=lambda: os._exit(1),
        )
        card = card_of_device(device.name, device.memory_gib) or UNKNOWN_GPU
        self._cost = LearnedCost(
            reference(
                Structure.of(self._denoiser.transformer.config),
                self._recipe.name,
                card if device.compute_capability else None,
            ),
            self._work,
            replace(
                self._new_image(self._warm_up_request(), StreamOptions()).shape, steps=USUAL_STEPS
            ),
        )
        self._metrics = GeneratorMetrics(self._model.pool_name(self._pool))
        with phases.timed("text"):
            embeds = await self._embed(self._warm_up_request())
        with phases.timed("warm-up"):
            attention = await asyncio.to_thread(warm_up.run, embeds)
            await self._draw(self._new_image(self._warm_up_request(), StreamOptions()))
        log.info("ready after %s; attention: %s", phases, attention)
        self._metrics.started(phases.seconds)
        self._start_s = time.monotonic() - began
        self._heartbeat = asyncio.create_task(self._report())

    async def generate(
        self, request: ImageRequest, lease: Lease, watch: StreamOptions, alone: bool
    ) -> AsyncIterator[Acknowledgement | Told | ImageResult]:
        """Both receipts, what `watch` asks for, then the finished image.

        `alone`: nothing else is drawn on this replica meanwhile. Raises `NonFiniteImage` and
        `Unavailable`. Closing the stream stops the work before its next step, and so does the end
        of the lease: a caller that was killed closes nothing.
        """
        yield Acknowledgement.TAKEN
        image = self._new_image(request, watch)
        image.task = asyncio.create_task(self._in_turn(image, alone))
        image.task.add_done_callback(lambda _: image.events.put_nowait(None))
        self._drawing[lease] = image
        try:
            async for told in self._watched(image):
                yield told
            result = await image.task
            image.done = True
        except NonFiniteImage:
            self._metrics.ended("non_finite")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._metrics.ended("cancelled")
            raise
        except Exception:  # counted here, answered elsewhere
            self._metrics.ended("failed")
            raise
        finally:
            image.task.cancel()
            del self._drawing[lease]
            if not image.done:
                done = replace(image.shape, steps=image.step)
                took_s = self._work.work_s(done) if image.step else 0.0
                self._stopped.append(StoppedImage(lease, image.step, took_s))
        self._metrics.drew(result.timings)
        log.info("drew %s", request.id)
        yield result

    async def check_health(self) -> None:
        """Called by Ray Serve; a replica that no longer reports itself would never be used."""
        if self._card:
            await asyncio.to_thread(self._card.check)
        if self._heartbeat.done() or not self._denoising.alive:
            raise RuntimeError("the heartbeat or the denoising loop has stopped")

    # -- one image ------------------------------------------------------------------------------

    def _new_image(self, request: ImageRequest, watch: StreamOptions) -> _Image:
        shape = ImageShape(
            width_px=request.width,
            height_px=request.height,
            text_tokens=self._text_tokens,
            rows=1 + request.guided,
            steps=request.num_inference_steps,
        )
        return _Image(request, watch, asyncio.Queue(), shape)

    async def _in_turn(self, image: _Image, alone: bool) -> ImageResult:
        async with self._room.entered(alone=alone):
            image.events.put_nowait(Acknowledgement.BEGUN)
            return await self._draw(image)

    async def _draw(self, image: _Image) -> ImageResult:
        request = image.request
        began = time.monotonic()
        embeds = await self._embed(request)
        text_s = time.monotonic() - began
        self._text_tokens = embeds.tokens.shape[1]
        image.shape = replace(image.shape, text_tokens=self._text_tokens)
        # Cancelling this coroutine cancels the future, which the loop sees before its next step.
        drawing = self._denoising.draw(
            request, embeds, image.watch.partial_images, self._teller(image)
        )
        drawn: GeneratedPixels = await asyncio.wrap_future(drawing)
        file, encode_s = await self._file(drawn.pixels, request)
        if request.id != WARM_UP:
            self._cost.observe(image.shape, drawn.busy_s)
        return ImageResult(
            image=file,
            seed=request.seed,
            precision=self._recipe.name,
            emulated=self._emulated,
            text_tokens=image.shape.text_tokens,
            work_s=drawn.busy_s * self._cost.speed,
            timings=Timings(
                text_s=text_s,
                denoise_s=drawn.denoise_s,
                decode_s=drawn.decode_s,
                encode_s=encode_s,
            ),
        )

    def _teller(self, image: _Image) -> Callable[[StepDone | PreviewPixels], None]:
        """What the loop's threads call; it hands over to the event loop what is watched."""
        event_loop = asyncio.get_running_loop()
        told = 0.0

        def tell(event: StepDone | PreviewPixels) -> None:
            nonlocal told
            if isinstance(event, StepDone):
                image.step = event.step
                last = event.step == image.shape.steps
                if not image.watch.progress or (event.denoise_s - told < PROGRESS_S and not last):
                    return
                told = event.denoise_s
            event_loop.call_soon_threadsafe(image.events.put_nowait, event)

        return tell

    async def _watched(self, image: _Image) -> AsyncIterator[Acknowledgement | Told]:
        """That an image is begun, and what is watched of it, until it is done."""
        steps = image.shape.steps
        while (event := await image.events.get()) is not None:
            if isinstance(event, Acknowledgement):
                yield event
                if image.watch.progress:
                    yield Progress(0, steps, self._cost.coefficients.work_s(image.shape))
            elif isinstance(event, PreviewPixels):
                file, _ = await self._file(event.pixels, image.request)
                yield PartialImage(event.index, file)
            else:
                pace = event.denoise_s / event.step
                decode_s = self._cost.coefficients.pixel * image.shape.pixels
                yield Progress(event.step, steps, (steps - event.step) * pace + decode_s)

    async def _file(self, pixels: Any, request: ImageRequest) -> tuple[bytes, float]:
        """The image file of pixels (height_px, width_px, 3), and the seconds that it took."""

        def encode() -> tuple[bytes, float]:
            began = time.monotonic()
            file = encode_image(pixels, request, self._recipe.name)
            return file, time.monotonic() - began

        return await asyncio.get_running_loop().run_in_executor(self._file_thread, encode)

    async def _embed(self, request: ImageRequest) -> PromptEmbeds:
        """One row, or two with guidance. Raises `Unavailable` if encoders die again and again."""
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
        with phases.timed("checkpoint"):
            folder = open_checkpoint(source, self._models_folder, DENOISER_COMPONENTS)
        with phases.timed("load"):
            return Denoiser.load(folder, self._recipe, device_for(self._pool))

    def _warm_up_request(self) -> ImageRequest:
        """Touches text encoder, kernels and VAE, so that the first client does not wait."""
        width, height = warm_sizes(self._pool, self._denoiser)[0]
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

    def _said(self) -> Heartbeat:
        """While an image is drawn alone, or waits for that, there is no slot for another."""
        drawing = list(self._drawing.values())
        work_s = sum(
            self._cost.coefficients.work_s(replace(i.shape, steps=i.shape.steps - i.step))
            for i in drawing
        )
        return Heartbeat(
            pool=self._model.pool_name(self._pool),
            replica=self._replica,
            slots=len(drawing) if self._room.reserved else self._pool.slots,
            running_work_s=work_s,
            speed=self._cost.speed,
            node=self._node,
            start_s=self._start_s,
        )

    def record_routing_stats(self) -> dict[str, bool]:
        """Called by Ray Serve for `serve.engine.routing`."""
        return {"leaving": self._leaving}

    async def _report(self) -> None:
        import ray
        from ray import serve  # the contexts exist only inside a replica

        self._replica = serve.get_replica_context().replica_id.unique_id
        self._node = ray.get_runtime_context().get_node_id()
        while self._denoising.alive:
            said, stopped = self._said(), list(self._stopped)
            try:
                reply = await self._dispatcher.report_replica.remote(
                    said, list(self._drawing), stopped
                )
                del self._stopped[: len(stopped)]
                self._leaving = reply.leaving
                self._drop(reply.orphans, time.monotonic())
            except Exception:  # a replica that stops reporting is lost: go on whatever happened
                log.warning("could not report to the dispatcher; trying again", exc_info=True)
                self._orphans.clear()  # sessions need their time anew
            self._metrics.report(self._denoising.counts, said.speed, self._cost.coefficients)
            await asyncio.sleep(HEARTBEAT_S)

    def _drop(self, orphans: Iterable[Lease], now: float) -> None:
        """Stop what nobody has held for as long as a session may take to come back."""
        self._orphans = {
            lease: self._orphans.get(lease, now) for lease in map(Lease._make, orphans)
        }
        for lease, since in self._orphans.items():
            image = self._drawing.get(lease)
            if now - since > SESSION_LEASE_S and image and image.task:
                log.warning("nobody waits for entry %s of session %s", lease.entry, lease.session)
                image.task.cancel()
