"""The denoising loop: images join and leave the batch between steps.

One thread owns the transformer. Before each step it admits what has arrived and drops what is no
longer wanted; `batching` chooses who goes on together. Each image has its own size, steps,
guidance and seed. On a card, a second thread decodes finished images and draws previews beside the
next steps. On a CPU the same thread does, between steps: two threads that compute there slow each
other down by more than they save.

Rows are padded to fixed bucket sizes, because matrix products of another row count round
differently: within a bucket an image is the same bit for bit whatever runs beside it, across
buckets it differs by rounding. The same holds for images of one size that end with the same step:
they are decoded together, by powers of two. A deterministic image always runs in a bucket of
`PINNED_ROWS` and is decoded alone.

When the memory does not suffice for a batch, the step is repeated with fewer rows, and batches stay
smaller for a while. An image for which alone it does not suffice is given up after some attempts.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import NonFiniteImage, Unavailable
from ..request import ImageRequest
from .batching import RowBudget, Running, next_batch
from .sd3 import Denoiser, Denoising, PromptEmbeds, to_pixels

log = logging.getLogger("ray.serve")

BUCKETS = 1, 2, 4, 8, 16, 32
ROWS_OF_AN_IMAGE = 2  # with guidance
PINNED_ROWS = ROWS_OF_AN_IMAGE
DECODED_PIXELS = 2**20  # at once, unless a single image has more: what the VAE takes grows with it
MEMORY_ATTEMPTS = 3  # of an image alone, each with the allocator's own memory given back before
PAUSE_S = 0.5  # between them: what is being decoded may be what takes the memory


class Drawn(NamedTuple):
    """`pixels`: (height_px, width_px, 3); seconds of all steps, with waiting, and of the VAE.

    `busy_s`: of the steps in its share of their rows, and of the VAE: what it cost the replica.
    """

    pixels: NDArray[np.uint8]
    denoise_s: float
    decode_s: float
    busy_s: float


class Stepped(NamedTuple):
    """An image has taken another step: how many, and how long they took with waiting."""

    step: int
    denoise_s: float


@dataclass(frozen=True, slots=True)
class Previewed:
    """`pixels`: (height_px, width_px, 3), of preview number `index`, counted from 0."""

    index: int
    pixels: NDArray[np.uint8]


Tell = Callable[[Stepped | Previewed], None]


@dataclass(slots=True)
class Counts:
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
    done: Future[Drawn]
    began: float = 0.0
    denoise_s: float = 0.0
    busy_s: float = 0.0
    too_large: int = 0
    image: Denoising = field(init=False)
    running: Running = field(init=False)

    def may_try_again(self) -> bool:
        """Whether an image for which the memory did not suffice gets another attempt."""
        self.too_large += 1
        return self.too_large < MEMORY_ATTEMPTS


class DenoisingLoop:
    """`max_rows`, at most the largest bucket, bounds a batch; guidance takes two rows an image.

    `beside`: whether images are decoded in a second thread; by default, if the card can do both.
    """

    def __init__(self, denoiser: Denoiser, max_rows: int, beside: bool | None = None) -> None:
        self._denoiser = denoiser
        self._budget = RowBudget(max_rows, ROWS_OF_AN_IMAGE)
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._arrivals = 0
        self.counts = Counts()
        self._beside: ThreadPoolExecutor | None = None
        if denoiser.on_cuda if beside is None else beside:
            self._beside = ThreadPoolExecutor(
                1, "decoding", initializer=torch.set_flush_denormal, initargs=(True,)
            )
        self._thread = threading.Thread(target=self._run, name="denoising", daemon=True)
        self._thread.start()

    def draw(
        self,
        request: ImageRequest,
        embeds: PromptEmbeds,
        previews: int = 0,
        tell: Tell = lambda _: None,
    ) -> Future[Drawn]:
        """Admit an image at the next step; cancelling the future drops it before its next one.

        `tell` hears in the loop's threads of each step and preview, and must not block. The
        future raises `NonFiniteImage`, `Unavailable` for want of memory, or what the model raised.
        """
        done: Future[Drawn] = Future()
        self._inbox.put(_Job(request, embeds, previews, tell, done))
        return done

    def close(self) -> None:
        """End the threads after the step they are in; images under way are dropped."""
        self._inbox.put(None)
        self._thread.join()
        if self._beside:
            self._beside.shutdown(cancel_futures=True)

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
            rows = self._budget.rows(time.monotonic())
            chosen = next_batch((job.running for job in self._jobs), rows)
            batch = [job for job in self._jobs if any(job.running is r for r in chosen)]
            try:
                self._step(batch)
            except Exception as error:  # whatever the model raises, the others go on
                if is_out_of_memory(error):
                    self._make_room(batch, error)
                else:
                    self._find_the_cause(batch, error)

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
            max_rows=PINNED_ROWS if request.deterministic else None,
        )

    def _step(self, batch: list[_Job]) -> None:
        rows = sum(job.running.rows for job in batch)
        pinned = batch[0].request.deterministic
        began = time.monotonic()
        self._denoiser.denoise_step(
            [job.image for job in batch], PINNED_ROWS if pinned else bucket(rows)
        )
        now = time.monotonic()
        self.counts.steps += 1
        self.counts.rows += rows
        self.counts.step_s += now - began
        for job in batch:
            job.busy_s += (now - began) * job.running.rows / rows
            job.denoise_s = now - job.began
            job.running.steps_left = job.image.steps_left
            job.too_large = 0
            job.tell(Stepped(job.image.step, job.denoise_s))
            previews = preview_steps(job.request.num_inference_steps, job.previews)
            if job.image.step in previews:
                index = previews.index(job.image.step)
                self._aside(partial(self._preview, job, index, job.image.estimate))
        finished = [job for job in batch if job.image.finished]
        self._jobs = [job for job in self._jobs if not job.image.finished]
        for together in decoded_together(finished):
            self._aside(partial(self._decode, together))

    def _find_the_cause(self, batch: list[_Job], error: Exception) -> None:
        """A step failed: repeat it image by image, and give up those that fail by themselves."""
        log.warning("a step of %d images failed", len(batch), exc_info=error)
        self._denoiser.check_device()
        if len(batch) == 1:
            self._finish(batch[0], error)
            return
        for job in batch:
            try:
                self._step([job])
            except Exception as own:
                self._finish(job, own)
                self._denoiser.check_device()

    def _make_room(self, batch: list[_Job], error: Exception) -> None:
        """The memory did not suffice for a batch; nobody in it has taken the step."""
        rows = sum(job.running.rows for job in batch)
        self._count_out_of_memory()
        if self._budget.shrink(rows, time.monotonic()):
            log.warning("out of memory with %d rows: smaller batches for a while", rows)
            return
        log.warning("out of memory with %d rows of %s", rows, batch[0].request.size)
        for job in batch:
            if not job.may_try_again():
                self._finish(job, error)
        time.sleep(PAUSE_S)

    def _count_out_of_memory(self) -> None:
        self.counts.out_of_memory += 1
        self._denoiser.free_memory()

    # -- aside from the steps -------------------------------------------------------------------

    def _aside(self, work: Callable[[], None]) -> None:
        if self._beside:
            self._beside.submit(work)
        else:
            work()

    def _decode(self, jobs: list[_Job]) -> None:
        """Settle images of one size; without memory for several, one by one."""
        began = time.monotonic()
        jobs = [job for job in jobs if not job.done.cancelled()]
        outcomes: list[NDArray[np.uint8] | Exception] = []
        while not outcomes and jobs:
            try:
                outcomes = self._pixels(jobs)
            except Exception as error:  # of one of these images
                if is_out_of_memory(error):
                    self._count_out_of_memory()
                if len(jobs) > 1:
                    for job in jobs:
                        self._decode([job])
                    return
                if is_out_of_memory(error) and jobs[0].may_try_again():
                    time.sleep(PAUSE_S)
                else:
                    outcomes = [error]
        decode_s = time.monotonic() - began
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._settle(job, outcome)
            else:
                busy_s = job.busy_s + decode_s / len(jobs)
                self._settle(job, Drawn(outcome, job.denoise_s, decode_s, busy_s))

    def _pixels(self, jobs: list[_Job]) -> list[NDArray[np.uint8] | Exception]:
        precision = self._denoiser.recipe.name
        with self._denoiser.beside_steps():
            latents = torch.cat([job.image.latents for job in jobs])
            finite = latents.isfinite().flatten(1).all(dim=1).tolist()
            pictures = self._denoiser.decode(latents)
            found: list[NDArray[np.uint8] | Exception] = []
            for picture, denoised in zip(pictures, finite, strict=True):
                if not denoised:
                    text = f"the model produced non-finite numbers in {precision}"
                    found.append(NonFiniteImage(text))
                elif not picture.isfinite().all():
                    text = f"the VAE produced non-finite numbers in {precision}"
                    found.append(NonFiniteImage(text))
                else:
                    found.append(to_pixels(picture))
            return found

    def _preview(self, job: _Job, index: int, latents: torch.Tensor) -> None:
        if job.done.cancelled():
            return
        try:
            with self._denoiser.beside_steps():
                pixels = to_pixels(self._denoiser.preview(latents))
        except Exception:  # the image itself goes on
            log.warning("no preview of %s", job.request.id, exc_info=True)
        else:
            job.tell(Previewed(index, pixels))

    def _finish(self, job: _Job, error: Exception) -> None:
        self._jobs = [other for other in self._jobs if other is not job]
        self._settle(job, error)

    def _settle(self, job: _Job, outcome: Drawn | Exception) -> None:
        if not job.done.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            lacked = is_out_of_memory(outcome)
            job.done.set_exception(_no_memory(job) if lacked else outcome)
        else:
            job.done.set_result(outcome)


def bucket(rows: int) -> int:
    """The rows to which a batch is padded."""
    return next(size for size in BUCKETS if size >= rows)


def decoded_together(jobs: list[_Job]) -> list[list[_Job]]:
    """Images of one size in groups of powers of two, within `DECODED_PIXELS`."""
    groups: list[list[_Job]] = []
    while jobs:
        first = jobs[0].request
        most = max(1, DECODED_PIXELS // (first.width * first.height))
        most = 1 if first.deterministic else min(most, len(jobs))
        size = 1 << most.bit_length() - 1
        groups.append(jobs[:size])
        jobs = jobs[size:]
    return groups


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which steps previews are drawn: evenly spread, fewer if there are too few steps."""
    return sorted({steps * i // (previews + 1) for i in range(1, previews + 1)} - {0})


def is_out_of_memory(error: Exception) -> bool:
    """CUDA's allocator has an exception of its own, the CPU's only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _no_memory(job: _Job) -> Unavailable:
    return Unavailable(f"not enough memory to draw {job.request.size} now")
