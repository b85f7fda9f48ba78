"""The Generator deployment: one replica draws the images of one pool.

One thread owns the model and one writes image files, so the event loop is always free for
heartbeats and cancellations. Cancelling the call sets a flag that the denoising thread reads at
every step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.capability import Capability, capability, probe

from ..dispatch.dispatcher import HEARTBEAT_S
from ..errors import NonFiniteImage, OctetError, Unavailable
from ..lost import REPLICA_LOST
from ..request import ImageRequest, ImageResult, Timings
from ..settings import Pool, ServedModel
from .checkpoint import open_checkpoint
from .image_file import encode_image
from .precision import RECIPES, Recipe
from .sd3 import DENOISER_COMPONENTS, Denoiser, PromptEmbeds, to_pixels

log = logging.getLogger("ray.serve")

SLOTS = 1  # images at a time per replica, until the engine batches between steps
ENCODER_ATTEMPTS = 3


class Cancelled(Exception):
    """The image is no longer wanted."""


def choose_recipe(pool: Pool, device: Capability) -> Recipe:
    """The recipe that a pool runs on a device. Raises `OctetError` if it has no FP8."""
    if pool.precision == "fp8":
        if device.fp8 == "none":
            raise OctetError(f"an FP8 pool cannot run here: {device.reason}")
        return RECIPES["fp8"]
    return RECIPES[device.sixteen_bit]


class Generator:
    """Draws one image a call; reports itself to the Dispatcher once it can."""

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
        self._model_thread = ThreadPoolExecutor(
            1, initializer=torch.set_flush_denormal, initargs=(True,)
        )
        self._file_thread = ThreadPoolExecutor(1)
        loop = asyncio.get_running_loop()
        self._denoiser = await loop.run_in_executor(self._model_thread, self._load)
        await self._draw(self._warm_up_request())
        self._heartbeat = asyncio.create_task(self._report())

    async def generate(self, request: ImageRequest) -> AsyncIterator[ImageResult | None]:
        """None at once, which says that this replica has begun; then the finished image.

        Raises `NonFiniteImage`. Closing the stream stops the work before its next step.
        """
        yield None
        result = await self._draw(request)
        log.info("drew %s", request.id)
        yield result

    async def check_health(self) -> None:
        """Called by Ray Serve; a replica that no longer reports itself would never be used."""
        if self._heartbeat.done():
            raise RuntimeError("the heartbeat has stopped")

    async def _draw(self, request: ImageRequest) -> ImageResult:
        loop, cancelled, began = asyncio.get_running_loop(), threading.Event(), time.monotonic()
        embeds = await self._embed(request)
        text_s = time.monotonic() - began
        try:
            pixels, denoise_s, decode_s = await loop.run_in_executor(
                self._model_thread, self._denoise, request, embeds, cancelled
            )
        except asyncio.CancelledError:
            cancelled.set()
            raise
        began = time.monotonic()
        image = await loop.run_in_executor(
            self._file_thread, encode_image, pixels, request, self._recipe.name
        )
        return ImageResult(
            image=image,
            seed=request.seed,
            precision=self._recipe.name,
            emulated=self._emulated,
            timings=Timings(
                text_s=text_s,
                denoise_s=denoise_s,
                decode_s=decode_s,
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

    def _denoise(
        self, request: ImageRequest, embeds: PromptEmbeds, cancelled: threading.Event
    ) -> tuple[NDArray[np.uint8], float, float]:
        """Pixels (height_px, width_px, 3) and the seconds of denoising and of decoding."""
        began = time.monotonic()
        image = self._denoiser.begin(
            embeds,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
        )
        while not image.finished:
            if cancelled.is_set():
                raise Cancelled
            self._denoiser.denoise_step([image])
        if not image.latents.isfinite().all():
            raise NonFiniteImage(f"the model produced non-finite numbers in {self._recipe.name}")
        denoised = time.monotonic()
        picture = self._denoiser.decode(image.latents)[0]
        if not picture.isfinite().all():
            raise NonFiniteImage(f"the VAE produced non-finite numbers in {self._recipe.name}")
        return to_pixels(picture), denoised - began, time.monotonic() - denoised

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

    async def _report(self) -> None:
        from ray import serve  # the context exists only inside a replica

        replica = serve.get_replica_context().replica_id.unique_id
        pool = self._model.pool_name(self._pool)
        while True:
            try:
                await self._dispatcher.report_replica.remote(pool, replica, SLOTS)
            except Exception:  # a replica that stops reporting is lost: go on whatever happened
                log.warning("could not report to the dispatcher; trying again", exc_info=True)
            await asyncio.sleep(HEARTBEAT_S)
