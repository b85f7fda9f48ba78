"""The denoising loop: images join and leave the batch between steps.

One thread owns the transformer. Before each step it takes in the images that have arrived and drops
those that are no longer wanted. `batching` chooses the images that take the next step together.
`decoding` decodes the images whose steps are done, and encodes the picture of an edit before its
first step. Each image has its own size, steps, guidance and seed.

A batch is padded to one of a few fixed numbers of rows, its *bucket*. The reason is that matrix
products with another number of rows round differently. If all steps of an image run in the same
bucket, the image is the same bit for bit, whatever other images run in its batches. Other buckets
give images that differ by rounding. A deterministic image always runs in a bucket of `PINNED_ROWS`
rows.

A step that fails is repeated. After an out-of-memory error it is repeated with fewer rows, and
batches stay smaller for a while. After any other error each image of the batch is repeated alone.
An image that fails alone is given up; after an out-of-memory error only when `MEMORY_ATTEMPTS`
attempts have failed.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..edit_pixels import EditPixels
from ..request import ImageRequest
from .batching import BatchCandidate, RowBudget, StepTimes, next_batch
from .decoding import MEMORY_ATTEMPTS, MEMORY_PAUSE_S, Decoding, is_out_of_memory, no_memory
from .denoiser import Denoiser, DenoisingState, EditLatents
from .prompt_embeds import PromptEmbeds

log = logging.getLogger("ray.serve")

T = TypeVar("T")

BUCKETS = 1, 2, 4, 8, 16, 32
ROWS_OF_AN_IMAGE = 2  # rows of an image with guidance
PINNED_ROWS = ROWS_OF_AN_IMAGE


class GeneratedPixels(NamedTuple):
    """A finished image; `pixels`: (height_px, width_px, 3).

    `latents_s`: seconds of encoding the picture of an edit. `denoise_s`: seconds from the image's
    first step to its last, including steps of other images. `decode_s`: seconds of decoding.
    `busy_s`: the seconds that the image cost the replica. These are its share of each of its steps,
    in proportion to its rows in the batch, and the seconds of the VAE.
    """

    pixels: NDArray[np.uint8]
    latents_s: float
    denoise_s: float
    decode_s: float
    busy_s: float


class StepDone(NamedTuple):
    """An image has taken `step` steps.

    `denoise_s`: seconds since the image began, including steps of other images.
    """

    step: int
    denoise_s: float


@dataclass(frozen=True, slots=True)
class PreviewPixels:
    """A preview of an image; `index` counts from 0, `pixels` has shape (height_px, width_px, 3)."""

    index: int
    pixels: NDArray[np.uint8]


OnEvent = Callable[[StepDone | PreviewPixels], None]


@dataclass(slots=True)
class LoopCounts:
    """Counters of the loop's work so far; the numbers only grow."""

    steps: int = 0  # calls of the transformer
    rows: int = 0  # rows in these calls, without padding
    step_s: float = 0.0
    out_of_memory: int = 0


@dataclass(slots=True, eq=False)
class _NewImage:
    """An image that has been requested.

    `edited`: an edit's picture and mask; `latents` is None until it is encoded. `latents_s`:
    seconds that this took. `memory_failures`: how many attempts in a row have run out of memory.
    """

    request: ImageRequest
    embeds: PromptEmbeds
    previews: int
    on_event: OnEvent
    done: Future[GeneratedPixels]
    edited: EditPixels | None = None
    owner: str = ""
    latents: EditLatents | None = None
    latents_s: float = 0.0
    memory_failures: int = 0


@dataclass(slots=True, eq=False)
class _ThreadWork(Generic[T]):
    """A function that one of the loop's threads is to call, and the future of its result."""

    function: Callable[[], T]
    done: Future[T]

    def run(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            result = self.function()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(result)


@dataclass(slots=True, kw_only=True, eq=False)
class _RunningImage(BatchCandidate):
    """An image that is being denoised; it takes no step before the time `not_before`."""

    new: _NewImage
    state: DenoisingState
    began: float
    busy_s: float = 0.0
    not_before: float = 0.0

    @property
    def request(self) -> ImageRequest:
        return self.new.request


class DenoisingLoop:
    """Generates images, several at a time, in batches of at most `max_rows` rows.

    An image without guidance takes one row, with guidance two. `max_rows` must not exceed the
    largest of `BUCKETS`. `on_broken` is called when the device can no longer be used; the running
    images would otherwise wait for ever. `beside_steps`: as for `Decoding`. `memory_pause_s`: how
    many seconds an image waits after it ran out of memory, before it is tried again.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        max_rows: int,
        on_broken: Callable[[], None] = lambda: None,
        beside_steps: bool | None = None,
        memory_pause_s: float = MEMORY_PAUSE_S,
    ) -> None:
        self._denoiser, self._on_broken = denoiser, on_broken
        self._memory_pause_s = memory_pause_s
        self._decoding = Decoding(denoiser, beside_steps, memory_pause_s)
        self._budget, self._times = RowBudget(max_rows, ROWS_OF_AN_IMAGE), StepTimes()
        self._inbox: queue.SimpleQueue[_NewImage | _ThreadWork[Any] | None] = queue.SimpleQueue()
        self._running: list[_RunningImage] = []
        self._arrivals = 0
        self._counts = LoopCounts()
        # torch keeps its compiler's settings by context, so the thread runs in a copy of this one.
        run = partial(contextvars.copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="denoising", daemon=True)
        self._thread.start()

    def generate(
        self,
        request: ImageRequest,
        embeds: PromptEmbeds,
        previews: int = 0,
        on_event: OnEvent = lambda _: None,
        edited: EditPixels | None = None,
        owner: str = "",
    ) -> Future[GeneratedPixels]:
        """Generate an image, which joins the others before their next step.

        Cancelling the returned future drops the image before its next step. `previews`: how many
        previews to make. `on_event` is called in the loop's threads for each step and preview; it
        must not block or raise. `edited`: an edit's picture and mask. `owner`: whose image it is;
        those with many images running make room for the others. The future raises
        `NonFiniteImage` if the result holds non-finite numbers, `Unavailable` if memory ran out, or
        what the model raised.
        """
        done: Future[GeneratedPixels] = Future()
        self._inbox.put(_NewImage(request, embeds, previews, on_event, done, edited, owner))
        return done

    def call(self, function: Callable[[], T], *, decoding: bool = False) -> Future[T]:
        """Call a function in the thread that takes the steps, or in the one that decodes.

        cuDNN keeps the plans that it has made by thread, so the warm-up runs in these threads.
        """
        work = _ThreadWork(function, Future())
        if decoding:
            self._inbox.put(_ThreadWork(lambda: self._decoding.submit(work.run), Future()))
        else:
            self._inbox.put(work)
        return work.done

    def close(self) -> None:
        """End the loop's threads after the current step; unfinished images are dropped."""
        self._inbox.put(None)
        self._thread.join()
        self._decoding.close()

    @property
    def counts(self) -> LoopCounts:
        """The counters of the loop; `out_of_memory` includes the errors of decoding."""
        decodes = self._decoding.out_of_memory
        return replace(self._counts, out_of_memory=self._counts.out_of_memory + decodes)

    @property
    def alive(self) -> bool:
        """Return whether the loop's thread still runs; without it images would wait for ever."""
        return self._thread.is_alive()

    def _run(self) -> None:
        torch.set_flush_denormal(True)
        try:
            while self._take_in():
                self._running = [i for i in self._running if not i.new.done.cancelled()]
                now = time.monotonic()
                ready = [image for image in self._running if image.not_before <= now]
                if ready:
                    self._step(next_batch(ready, self._budget.rows(now), self._fitting))
        except Exception:  # the device or this loop is broken, so no image can be finished
            log.exception("the denoising loop has ended")
            self._on_broken()

    def _take_in(self) -> bool:
        """Begin the images that have arrived; wait as long as no image can take a step.

        Returns False if the loop should end.
        """
        while True:
            try:
                new = self._inbox.get(timeout=self._wait_s())
            except queue.Empty:
                return True
            if new is None:
                return False
            if isinstance(new, _ThreadWork):
                new.run()
                continue
            if new.done.cancelled():
                continue
            if new.edited and new.latents is None:
                self._decoding.submit(partial(self._encode, new, new.edited))
                continue
            try:
                image = self._begin(new)
            except Exception as error:
                failure = error
            else:
                self._running.append(image)
                continue
            if is_out_of_memory(failure):
                self._out_of_memory(failure)
                new.memory_failures += 1
                if new.memory_failures < MEMORY_ATTEMPTS:
                    self._inbox.put(new)
                    continue
                failure = no_memory(new.request.width, new.request.height)
            self._denoiser.check_device()
            _settle(new, failure)

    def _wait_s(self) -> float | None:
        """Seconds until the next image may take a step; None if no image is running."""
        if not self._running:
            return None
        first = min(image.not_before for image in self._running)
        return max(first - time.monotonic(), 0.0)

    def _begin(self, new: _NewImage) -> _RunningImage:
        request, began = new.request, time.monotonic()
        state = self._denoiser.begin_request(request, new.embeds, new.latents)
        self._arrivals += 1
        return _RunningImage(
            new=new,
            state=state,
            began=began,
            kind=(request.canvas, new.embeds.tokens.shape[1], request.deterministic),
            rows=state.rows,
            steps_left=state.steps_left,
            arrival=self._arrivals,
            busy_s=new.latents_s,
            max_rows=PINNED_ROWS if request.deterministic else None,
            owner=new.owner,
        )

    def _fitting(self, batch: list[_RunningImage], hosts: int) -> int:
        """How many images of the batch, from its beginning, should take the next step.

        `hosts`: how many of them, from the beginning, are no guests.
        """
        batches = []
        for images in range(1, len(batch) + 1):
            part = batch[:images]
            batches.append((sum(image.rows for image in part), _padded_rows(part)))
        return self._times.fitting(batch[0].kind, batches, hosts) + 1

    # -- a step ---------------------------------------------------------------------------------

    def _step(self, batch: list[_RunningImage]) -> None:
        """Take one step with a batch.

        If the model raises an error, at most the images of this batch fail.
        """
        rows = sum(image.rows for image in batch)
        began = time.monotonic()
        try:
            self._denoiser.denoise_step([image.state for image in batch], _padded_rows(batch))
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
            for image in batch:
                self._step([image])
        elif is_out_of_memory(failure):
            self._set_aside(batch[0])
        else:
            self._give_up(batch[0], failure)

    def _stepped(self, batch: list[_RunningImage], rows: int, step_s: float) -> None:
        now = time.monotonic()
        self._times.observe(batch[0].kind, _padded_rows(batch), step_s)
        self._counts.steps += 1
        self._counts.rows += rows
        self._counts.step_s += step_s
        self._running = [image for image in self._running if not image.state.finished]
        for image in batch:
            image.busy_s += step_s * image.rows / rows
            image.steps_left = image.state.steps_left
            image.new.memory_failures = 0
            step = image.state.steps_done
            image.new.on_event(StepDone(step, now - image.began))
            previews = preview_steps(image.request.steps, image.new.previews)
            if step in previews:
                index, state = previews.index(step), replace(image.state)
                self._decoding.submit(partial(self._preview, image, index, state))
            if image.state.finished:
                self._decoding.submit(partial(self._decode, image, now - image.began))

    def _out_of_memory(self, failure: Exception) -> None:
        failure.__traceback__ = None  # it holds the failed call's tensors
        self._counts.out_of_memory += 1
        self._denoiser.free_memory()

    def _set_aside(self, image: _RunningImage) -> None:
        """Let an image pause that ran out of memory in a batch of its own.

        After `MEMORY_ATTEMPTS` such failures in a row the image is given up.
        """
        log.warning("out of memory with one image of %s", image.request.size)
        image.new.memory_failures += 1
        image.not_before = time.monotonic() + self._memory_pause_s
        if image.new.memory_failures >= MEMORY_ATTEMPTS:
            self._give_up(image, no_memory(image.request.width, image.request.height))

    def _give_up(self, image: _RunningImage, error: Exception) -> None:
        self._running = [other for other in self._running if other is not image]
        _settle(image.new, error)

    # -- work that `decoding` runs ---------------------------------------------------------------

    def _encode(self, new: _NewImage, edited: EditPixels) -> None:
        """Encode the picture of an edit, and let the image join the others then."""
        if new.done.cancelled():
            return
        began = time.monotonic()
        try:
            new.latents = self._decoding.latents(edited, new.request.seed)
        except Exception as error:
            self._failed_in_vae(new, error)
        else:
            new.latents_s = time.monotonic() - began
            self._inbox.put(new)

    def _failed_in_vae(self, new: _NewImage, error: Exception) -> None:
        try:
            self._denoiser.check_device()
        except Exception:  # the device is broken, so no image can be finished
            log.exception("the device has failed")
            self._on_broken()
        _settle(new, error)

    def _decode(self, image: _RunningImage, denoise_s: float) -> None:
        if image.new.done.cancelled():
            return
        began = time.monotonic()
        try:
            pixels = self._decoding.picture(image.state, image.new.edited)
        except Exception as error:
            self._failed_in_vae(image.new, error)
        else:
            decode_s = time.monotonic() - began
            generated = GeneratedPixels(
                pixels, image.new.latents_s, denoise_s, decode_s, image.busy_s + decode_s
            )
            _settle(image.new, generated)

    def _preview(self, image: _RunningImage, index: int, state: DenoisingState) -> None:
        if image.new.done.cancelled():
            return
        try:
            pixels = self._decoding.preview(state, image.new.edited)
        except Exception:  # the image itself goes on
            log.warning("no preview of %s", image.request.id, exc_info=True)
        else:
            image.new.on_event(PreviewPixels(index, pixels))


def _padded_rows(batch: list[_RunningImage]) -> int:
    if batch[0].request.deterministic:
        return PINNED_ROWS
    return bucket(sum(image.rows for image in batch))


def _settle(image: _NewImage, outcome: GeneratedPixels | Exception) -> None:
    if not image.done.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        image.done.set_exception(outcome)
    else:
        image.done.set_result(outcome)


def bucket(rows: int) -> int:
    """The number of rows to which a batch of `rows` rows is padded."""
    return next(size for size in BUCKETS if size >= rows)


def buckets(most: int) -> list[int]:
    """The numbers of rows that a call of the transformer can have, up to `most`."""
    return [size for size in BUCKETS if size <= most]


def preview_steps(steps: int, previews: int) -> list[int]:
    """The steps after which previews are made, spread evenly.

    Fewer than `previews` if an image has too few steps. Example: 28 steps and 3 previews give
    [7, 14, 21].
    """
    return sorted({steps * i // (previews + 1) for i in range(1, previews + 1)} - {0})
