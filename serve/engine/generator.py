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
from ..errors import NonFiniteImage, OctetError
from ..request import ImageRequest, ImageResult, Timings
from ..settings import Model, Pool
from .image_file import encode_image
from .precision import RECIPES, Recipe
from .sd3 import Denoiser, PromptEmbeds, Source, to_pixels

log = logging.getLogger("ray.serve")

SLOTS = 1  # images at a time per replica, until the engine batches between steps


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
        text_encoder: Any,
        dispatcher: Any,
    ) -> None:
        self._model, self._pool = Model.model_validate(model), Pool.model_validate(pool)
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

    async def generate(self, request: ImageRequest) -> AsyncIterator[ImageResult]:
        """The finished image, as the one item of the stream.

        Raises `NonFiniteImage`. Closing the stream stops the work before its next step.
        """
        yield await self._draw(request)

    async def check_health(self) -> None:
        """Called by Ray Serve; a replica that no longer reports itself would never be used."""
        if self._heartbeat.done():
            raise RuntimeError("the heartbeat has stopped")

    async def _draw(self, request: ImageRequest) -> ImageResult:
        loop, cancelled, began = asyncio.get_running_loop(), threading.Event(), time.monotonic()
        prompts = [request.negative_prompt] if request.guided else []
        embeds = await self._text_encoder.encode.remote(
            [*prompts, request.prompt], self._model.max_sequence_length
        )
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

    def _load(self) -> Denoiser:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        source = Source(self._model.source.location, self._model.source.revision)
        return Denoiser(source, self._recipe, device)

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
        size = self._model.defaults.model_dump(include={"width", "height", "guidance_scale"})
        return ImageRequest(
            id="warm-up",
            model=self._model.id,
            prompt="warm-up",
            num_inference_steps=1,
            seed=0,
            **size,
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
