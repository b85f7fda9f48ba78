"""The denoising loop: images join and leave the batch between steps.

One thread owns the model. Before each step it admits what has arrived and drops what is no longer
wanted; `batching` chooses who goes on together; images whose last step is done are decoded. Each
image has its own size, steps, guidance and seed.

Rows are padded to fixed bucket sizes, because matrix products of another row count round
differently: within a bucket an image is the same bit for bit whatever runs beside it, across
buckets it differs by rounding. A deterministic image always runs in the largest bucket.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import NonFiniteImage
from ..request import ImageRequest
from .batching import Running, next_batch
from .sd3 import Denoiser, Denoising, PromptEmbeds, to_pixels

log = logging.getLogger("ray.serve")

BUCKETS = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True, slots=True)
class Drawn:
    """`pixels`: (height_px, width_px, 3); seconds of all steps, with waiting, and of the VAE."""

    pixels: NDArray[np.uint8]
    denoise_s: float
    decode_s: float


@dataclass(slots=True)
class _Job:
    request: ImageRequest
    embeds: PromptEmbeds
    done: Future[Drawn]
    began: float = 0.0
    image: Denoising = field(init=False)
    running: Running = field(init=False)


class DenoisingLoop:
    """`max_rows`, at most the largest bucket, bounds a batch; guidance takes two rows an image."""

    def __init__(self, denoiser: Denoiser, max_rows: int) -> None:
        self._denoiser, self._max_rows = denoiser, max_rows
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._arrivals = 0
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)
        self._thread.start()

    def draw(self, request: ImageRequest, embeds: PromptEmbeds) -> Future[Drawn]:
        """Admit an image at the next step; cancelling the future drops it before its next one.

        The future raises `NonFiniteImage`, or what the model raised.
        """
        done: Future[Drawn] = Future()
        self._inbox.put(_Job(request, embeds, done))
        return done

    def close(self) -> None:
        """End the thread after the step it is in; images under way are dropped."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """False once the thread has ended: its images would wait for ever."""
        return self._thread.is_alive()

    def _run(self) -> None:
        """Ends when closed, or when the device can no longer be used: see `alive`."""
        torch.set_flush_denormal(True)
        while self._admit():
            self._jobs = [job for job in self._jobs if not job.done.cancelled()]
            if not self._jobs:
                continue
            chosen = next_batch((job.running for job in self._jobs), self._max_rows)
            batch = [job for job in self._jobs if any(job.running is r for r in chosen)]
            try:
                self._step(batch)
            except Exception as error:  # whatever the model raises, images outside go on
                log.warning("a step of %d images failed", len(batch), exc_info=True)
                for job in batch:
                    self._finish(job, error)
                self._denoiser.check_device()

    def _admit(self) -> bool:
        """Take in what has arrived, waiting for it if there is nothing else; False to end."""
        while not self._inbox.empty() or not self._jobs:
            job = self._inbox.get()
            if job is None:
                return False
            if job.done.cancelled():
                continue
            try:
                self._begin(job)
            except Exception as error:  # of this image alone
                self._finish(job, error)
            else:
                self._jobs.append(job)
        return True

    def _begin(self, job: _Job) -> None:
        request = job.request
        job.began = time.monotonic()
        job.image = self._denoiser.begin(
            job.embeds,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
        )
        self._arrivals += 1
        job.running = Running(
            kind=(request.size, job.embeds.tokens.shape[1], request.deterministic),
            rows=job.image.rows,
            steps_left=job.image.steps_left,
            arrival=self._arrivals,
        )

    def _step(self, batch: list[_Job]) -> None:
        rows = sum(job.running.rows for job in batch)
        pinned = batch[0].request.deterministic
        self._denoiser.denoise_step(
            [job.image for job in batch], self._bucket(self._max_rows if pinned else rows)
        )
        for job in batch:
            job.running.steps_left = job.image.steps_left
        for job in batch:
            if job.image.finished:
                self._finish(job, self._decode(job))

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in BUCKETS if bucket >= rows)

    def _decode(self, job: _Job) -> Drawn | Exception:
        precision = self._denoiser.recipe.name
        try:
            if not job.image.latents.isfinite().all():
                raise NonFiniteImage(f"the model produced non-finite numbers in {precision}")
            denoised = time.monotonic()
            picture = self._denoiser.decode(job.image.latents)[0]
            if not picture.isfinite().all():
                raise NonFiniteImage(f"the VAE produced non-finite numbers in {precision}")
            pixels = to_pixels(picture)
        except Exception as error:  # of this image alone
            return error
        return Drawn(pixels, denoised - job.began, time.monotonic() - denoised)

    def _finish(self, job: _Job, outcome: Drawn | Exception) -> None:
        self._jobs = [other for other in self._jobs if other is not job]
        if not job.done.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            job.done.set_exception(outcome)
        else:
            job.done.set_result(outcome)
