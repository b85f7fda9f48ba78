"""The denoising loop: images join and leave the batch between steps.

One thread owns the transformer. Before each step it admits what has arrived and drops what is no
longer wanted; `batching` chooses who goes on together; `decoding` takes over what is finished. Each
image has its own size, steps, guidance and seed.

Rows are padded to fixed bucket sizes, because matrix products of another row count round
differently: within a bucket an image is the same bit for bit whatever runs beside it, across
buckets it differs by rounding. A deterministic image always runs in a bucket of `PINNED_ROWS`.

A step that fails is repeated: for want of memory with fewer rows, and batches stay smaller for a
while; otherwise image by image. An image whose step fails by itself is given up, for want of
memory after some attempts.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..request import ImageRequest
from .batching import BatchCandidate, RowBudget, next_batch
from .decoding import MEMORY_ATTEMPTS, PAUSE_S, Decoding, is_out_of_memory, no_memory
from .sd3 import Denoiser, DenoisingState, PromptEmbeds

log = logging.getLogger("ray.serve")

BUCKETS = 1, 2, 4, 8, 16, 32
ROWS_OF_AN_IMAGE = 2  # with guidance
PINNED_ROWS = ROWS_OF_AN_IMAGE


class GeneratedPixels(NamedTuple):
    """`pixels`: (height_px, width_px, 3); seconds of all steps, with waiting, and of the VAE.

    `busy_s`: of the steps in its share of their rows, and of the VAE: what it cost the replica.
    """

    pixels: NDArray[np.uint8]
    denoise_s: float
    decode_s: float
    busy_s: float


class StepDone(NamedTuple):
    """An image has taken another step: how many, and how long they took with waiting."""

    step: int
    denoise_s: float


@dataclass(frozen=True, slots=True)
class PreviewPixels:
    """`pixels`: (height_px, width_px, 3), of preview number `index`, counted from 0."""

    index: int
    pixels: NDArray[np.uint8]


Tell = Callable[[StepDone | PreviewPixels], None]


@dataclass(slots=True)
class LoopCounts:
    """What the loop has done so far; only ever grows."""

    steps: int = 0  # calls of the transformer
    rows: int = 0  # in them, without padding
    step_s: float = 0.0
    out_of_memory: int = 0


@dataclass(slots=True)
class _Job:
    request: ImageRequest
    embeds: PromptEmbeds
    previews: int
    tell: Tell
    done: Future[GeneratedPixels]
    began: float = 0.0
    busy_s: float = 0.0
    too_large: int = 0  # attempts in a row for which alone the memory did not suffice
    not_before: float = 0.0
    image: DenoisingState = field(init=False)
    running: BatchCandidate = field(init=False)


class DenoisingLoop:
    """`max_rows`, at most the largest bucket, bounds a batch; guidance takes two rows an image.

    `broken` is called when the device can no longer be used: images under way would wait for ever.
    `beside`: see `Decoding`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        max_rows: int,
        broken: Callable[[], None] = lambda: None,
        beside: bool | None = None,
    ) -> None:
        self._denoiser, self._broken = denoiser, broken
        self._decoding = Decoding(denoiser, beside)
        self._budget = RowBudget(max_rows, ROWS_OF_AN_IMAGE)
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._arrivals = 0
        self._counts = LoopCounts()
        # With this thread's settings of torch's compiler, which are kept by context.
        run = partial(contextvars.copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="denoising", daemon=True)
        self._thread.start()

    def draw(
        self,
        request: ImageRequest,
        embeds: PromptEmbeds,
        previews: int = 0,
        tell: Tell = lambda _: None,
    ) -> Future[GeneratedPixels]:
        """Admit an image at the next step; cancelling the future drops it before its next one.

        `tell` hears in the loop's threads of each step and preview, and must not block or fail.
        The future raises `NonFiniteImage`, `Unavailable` for want of memory, or what the model
        raised.
        """
        done: Future[GeneratedPixels] = Future()
        self._inbox.put(_Job(request, embeds, previews, tell, done))
        return done

    def close(self) -> None:
        """End the threads after the step they are in; images under way are dropped."""
        self._inbox.put(None)
        self._thread.join()
        self._decoding.close()

    @property
    def counts(self) -> LoopCounts:
        decodes = self._decoding.out_of_memory
        return replace(self._counts, out_of_memory=self._counts.out_of_memory + decodes)

    @property
    def alive(self) -> bool:
        """False once the thread has ended: its images would wait for ever."""
        return self._thread.is_alive()

    def _run(self) -> None:
        torch.set_flush_denormal(True)
        try:
            while self._admit():
                self._jobs = [job for job in self._jobs if not job.done.cancelled()]
                now = time.monotonic()
                ready = [job for job in self._jobs if job.not_before <= now]
                if ready:
                    chosen = next_batch((job.running for job in ready), self._budget.rows(now))
                    self._step([job for job in ready if any(job.running is r for r in chosen)])
                elif self._jobs:
                    time.sleep(min(job.not_before for job in self._jobs) - now)
        except Exception:  # of the device, or of this loop: either way nothing more comes of it
            log.exception("the denoising loop has ended")
            self._broken()

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
            except Exception as error:
                failure = error
            else:
                self._jobs.append(job)
                continue
            if is_out_of_memory(failure):
                self._out_of_memory(failure)
                job.too_large += 1
                if job.too_large < MEMORY_ATTEMPTS:
                    self._inbox.put(job)
                    continue
                failure = no_memory(job.request.width, job.request.height)
            self._denoiser.check_device()
            _settle(job, failure)  # of this image alone
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
        job.running = BatchCandidate(
            kind=(request.size, job.embeds.tokens.shape[1], request.deterministic),
            rows=job.image.rows,
            steps_left=job.image.steps_left,
            arrival=self._arrivals,
            max_rows=PINNED_ROWS if request.deterministic else None,
        )

    # -- a step ---------------------------------------------------------------------------------

    def _step(self, batch: list[_Job]) -> None:
        """Whatever the model raises ends at most images of the batch."""
        rows = sum(job.running.rows for job in batch)
        began = time.monotonic()
        try:
            self._denoiser.denoise_step([job.image for job in batch], self._padded(batch))
        except Exception as error:
            failure = error
        else:
            self._stepped(batch, rows, time.monotonic() - began)
            return
        if is_out_of_memory(failure):
            self._out_of_memory(failure)
            if self._budget.shrink(rows, began):
                log.warning("out of memory with %d rows: smaller batches for a while", rows)
                return
        else:
            log.warning("a step of %d images failed", len(batch), exc_info=failure)
            self._denoiser.check_device()
        if len(batch) > 1:
            for job in batch:
                self._step([job])
        elif is_out_of_memory(failure):
            self._set_aside(batch[0])
        else:
            self._give_up(batch[0], failure)

    def _padded(self, batch: list[_Job]) -> int:
        if batch[0].request.deterministic:
            return PINNED_ROWS
        return bucket(sum(job.running.rows for job in batch))

    def _stepped(self, batch: list[_Job], rows: int, step_s: float) -> None:
        now = time.monotonic()
        self._counts.steps += 1
        self._counts.rows += rows
        self._counts.step_s += step_s
        self._jobs = [job for job in self._jobs if not job.image.finished]
        for job in batch:
            job.busy_s += step_s * job.running.rows / rows
            job.running.steps_left = job.image.steps_left
            job.too_large = 0
            job.tell(StepDone(job.image.step, now - job.began))
            previews = preview_steps(job.request.num_inference_steps, job.previews)
            if job.image.step in previews:
                index, image = previews.index(job.image.step), replace(job.image)
                self._decoding.submit(partial(self._preview, job, index, image))
            if job.image.finished:
                self._decoding.submit(partial(self._decode, job, now - job.began))

    def _out_of_memory(self, failure: Exception) -> None:
        failure.__traceback__ = None  # it holds the failed call's tensors
        self._counts.out_of_memory += 1
        self._denoiser.free_memory()

    def _set_aside(self, job: _Job) -> None:
        """The memory did not suffice for an image alone."""
        log.warning("out of memory with one image of %s", job.request.size)
        job.too_large += 1
        job.not_before = time.monotonic() + PAUSE_S
        if job.too_large >= MEMORY_ATTEMPTS:
            self._give_up(job, no_memory(job.request.width, job.request.height))

    def _give_up(self, job: _Job, error: Exception) -> None:
        self._jobs = [other for other in self._jobs if other is not job]
        _settle(job, error)

    # -- what `decoding` runs -------------------------------------------------------------------

    def _decode(self, job: _Job, denoise_s: float) -> None:
        if job.done.cancelled():
            return
        began = time.monotonic()
        try:
            pixels = self._decoding.picture(job.image)
        except Exception as error:
            try:
                self._denoiser.check_device()
            except Exception:  # of the device: nothing more comes of it
                log.exception("the device has failed")
                self._broken()
            _settle(job, error)  # of this image alone
        else:
            decode_s = time.monotonic() - began
            _settle(job, GeneratedPixels(pixels, denoise_s, decode_s, job.busy_s + decode_s))

    def _preview(self, job: _Job, index: int, image: DenoisingState) -> None:
        if job.done.cancelled():
            return
        try:
            pixels = self._decoding.preview(image)
        except Exception:  # the image itself goes on
            log.warning("no preview of %s", job.request.id, exc_info=True)
        else:
            job.tell(PreviewPixels(index, pixels))


def _settle(job: _Job, outcome: GeneratedPixels | Exception) -> None:
    if not job.done.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        job.done.set_exception(outcome)
    else:
        job.done.set_result(outcome)


def bucket(rows: int) -> int:
    """The rows to which a batch is padded."""
    return next(size for size in BUCKETS if size >= rows)


def buckets(most: int) -> list[int]:
    """All numbers of rows that a call can have, up to `most`."""
    return [size for size in BUCKETS if size <= most]


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which steps previews are drawn: evenly spread, fewer if there are too few steps."""
    return sorted({steps * i // (previews + 1) for i in range(1, previews + 1)} - {0})
