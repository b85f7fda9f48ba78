"""The Generator deployment: one replica draws the images of one pool.

The denoising loop's thread owns the model and another writes image files, so the event loop is
always free for heartbeats and cancellations.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cluster.capability import Capability, capability, probe

from ..dispatch.dispatcher import HEARTBEAT_S, SESSION_LEASE_S
from ..dispatch.grants import Lease
from ..errors import OctetError, Unavailable
from ..lost import REPLICA_LOST
from ..request import ImageRequest, ImageResult, Timings
from ..settings import Pool, ServedModel
from .checkpoint import open_checkpoint
from .denoising_loop import DenoisingLoop
from .image_file import encode_image
from .precision import RECIPES, Recipe
from .sd3 import DENOISER_COMPONENTS, Denoiser, PromptEmbeds

log = logging.getLogger("ray.serve")

ENCODER_ATTEMPTS = 3


def choose_recipe(pool: Pool, device: Capability) -> Recipe:
    """The recipe that a pool runs on a device. Raises `OctetError` if it has no FP8."""
    if pool.precision == "fp8":
        if device.fp8 == "none":
            raise OctetError(f"an FP8 pool cannot run here: {device.reason}")
        return RECIPES["fp8"]
    return RECIPES[device.sixteen_bit]


class Generator:
    """Draws an image a call, several at a time; reports itself to the Dispatcher once it can."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self,
        model: dict[str, Any],
        pool: dict[str, Any],
        emulate_fp8: bool,
        models_folder: str | None,
        text_encoder: Any,
        dispatcher: Any,
    ) -> None:
        self._model, self._pool = ServedModel.model_validate(model), Pool.model_validate(pool)
        self._models_folder = models_folder
        self._text_encoder, self._dispatcher = text_encoder, dispatcher
        found = capability(probe(), allow_emulated_fp8=emulate_fp8)
        self._recipe = choose_recipe(self._pool, found)
        self._emulated = self._recipe.fp8_linears and found.fp8 == "emulated"
        self._file_thread = ThreadPoolExecutor(1)
        self._drawing: dict[Lease, asyncio.Task[ImageResult]] = {}
        self._orphans: dict[Lease, float] = {}  # leases that nobody holds, and since when
        self._denoiser = await asyncio.to_thread(self._load)
        self._denoising = DenoisingLoop(self._denoiser, max_rows=2 * self._pool.slots)
        await self._draw(self._warm_up_request())
        self._heartbeat = asyncio.create_task(self._report())

    async def generate(
        self, request: ImageRequest, lease: Lease
    ) -> AsyncIterator[ImageResult | None]:
        """None at once, which says that this replica has begun; then the finished image.

        Raises `NonFiniteImage`. Closing the stream stops the work before its next step, and so
        does the end of the lease: a caller that was killed closes nothing.
        """
        yield None
        drawing = asyncio.create_task(self._draw(request))
        self._drawing[lease] = drawing
        try:
            result = await drawing
        finally:
            drawing.cancel()
            del self._drawing[lease]
        log.info("drew %s", request.id)
        yield result

    async def check_health(self) -> None:
        """Called by Ray Serve; a replica that no longer reports itself would never be used."""
        if self._heartbeat.done() or not self._denoising.alive:
            raise RuntimeError("the heartbeat or the denoising loop has stopped")

    async def _draw(self, request: ImageRequest) -> ImageResult:
        began = time.monotonic()
        embeds = await self._embed(request)
        text_s = time.monotonic() - began
        # Cancelling this coroutine cancels the future, which the loop sees before its next step.
        drawn = await asyncio.wrap_future(self._denoising.draw(request, embeds))
        began = time.monotonic()
        image = await asyncio.get_running_loop().run_in_executor(
            self._file_thread, encode_image, drawn.pixels, request, self._recipe.name
        )
        return ImageResult(
            image=image,
            seed=request.seed,
            precision=self._recipe.name,
            emulated=self._emulated,
            timings=Timings(
                text_s=text_s,
                denoise_s=drawn.denoise_s,
                decode_s=drawn.decode_s,
                encode_s=time.monotonic() - began,
            ),
        )

    async def _embed(self, request: ImageRequest) -> PromptEmbeds:
        """One row, or two with guidance. Raises `Unavailable` if encoders die again and again."""
        prompts = [request.negative_prompt] if request.guided else []
        for attempt in range(1, ENCODER_ATTEMPTS + 1):
            try:
                embeds: PromptEmbeds = await self._text_encoder.encode.remote(
                    [*prompts, request.prompt], self._model.max_sequence_length
                )
            except REPLICA_LOST:
                log.warning("%s: attempt %d lost the text encoder", request.id, attempt)
            else:
                return embeds
        raise Unavailable(f"the text encoder was lost in each of {ENCODER_ATTEMPTS} attempts")

    def _load(self) -> Denoiser:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        source = self._pool.source or self._model.source
        folder = open_checkpoint(source, self._models_folder, DENOISER_COMPONENTS)
        return Denoiser(folder, self._recipe, device)

    def _warm_up_request(self) -> ImageRequest:
        """Touches text encoder, kernels and VAE, so that the first client does not wait."""
        native_px = self._denoiser.native_size_px
        return ImageRequest(
            id="warm-up",
            model=self._model.id,
            prompt="warm-up",
            width=native_px,
            height=native_px,
            num_inference_steps=1,
            guidance_scale=2.0,
            seed=0,
        )

    def _drop(self, orphans: Iterable[Lease], now: float) -> None:
        """Stop what nobody has held for as long as a session may take to come back."""
        self._orphans = {
            lease: self._orphans.get(lease, now) for lease in map(Lease._make, orphans)
        }
        for lease, since in self._orphans.items():
            if now - since > SESSION_LEASE_S and lease in self._drawing:
                log.warning("nobody waits for entry %s of session %s", lease.entry, lease.session)
                self._drawing[lease].cancel()

    async def _report(self) -> None:
        from ray import serve  # the context exists only inside a replica

        replica = serve.get_replica_context().replica_id.unique_id
        pool = self._model.pool_name(self._pool)
        while self._denoising.alive:
            try:
                orphans = await self._dispatcher.report_replica.remote(
                    pool, replica, self._pool.slots, list(self._drawing)
                )
                self._drop(orphans, time.monotonic())
            except Exception:  # a replica that stops reporting is lost: go on whatever happened
                log.warning("could not report to the dispatcher; trying again", exc_info=True)
                self._orphans.clear()  # sessions need their time anew
            await asyncio.sleep(HEARTBEAT_S)
