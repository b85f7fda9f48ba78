"""Decoding of latents to finished images and previews, and encoding of the pictures of edits.

On a card a separate thread decodes and encodes, on its own CUDA stream, while the next denoising
steps run. On a CPU the denoising loop's thread does so between two steps, because two threads that
compute on a CPU slow each other down by more than they save. Images are decoded and encoded one by
one, because the VAE rounds differently when several images share a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..edit_pixels import EditPixels
from ..errors import NonFiniteImage, Unavailable
from .denoiser import Denoiser, DenoisingState, EditLatents, to_pixels
from .preview import VAE_FACTOR

T = TypeVar("T")

MEMORY_ATTEMPTS = 3  # attempts at an image alone, each after the allocator's cache was emptied
MEMORY_PAUSE_S = 0.5  # between these attempts, in case the memory is taken only for a moment
NO_MEMORY = "out of memory", "can't allocate memory", "ALLOC_FAILED"  # CUDA, the CPU, cuBLAS


class Decoding:
    """Decodes finished images and previews, and encodes the pictures of edits.

    `beside_steps`: whether to decode and encode in a separate thread, in parallel with the
    denoising steps; by default only on a card. `memory_pause_s`: how long that thread waits before
    it tries again after an out-of-memory error, in seconds.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        beside_steps: bool | None = None,
        memory_pause_s: float = MEMORY_PAUSE_S,
    ) -> None:
        self._denoiser, self._memory_pause_s = denoiser, memory_pause_s
        self.out_of_memory = 0  # calls of the VAE that ran out of memory
        self._thread: ThreadPoolExecutor | None = None
        if denoiser.on_cuda if beside_steps is None else beside_steps:
            self._thread = ThreadPoolExecutor(
                1, "decoding", initializer=torch.set_flush_denormal, initargs=(True,)
            )

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` later in the decoding thread if there is one, otherwise at once."""
        if self._thread:
            self._thread.submit(work)
        else:
            work()

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def picture(self, image: DenoisingState, edited: EditPixels | None = None) -> NDArray[np.uint8]:
        """Decode a finished image to pixels (height_px, width_px, 3).

        `edited`: an edit's picture and mask, whose kept pixels stay as they are. Raises
        `NonFiniteImage` if the latents or the decoded image hold non-finite numbers, `Unavailable`
        if memory ran out in each of several attempts, or what the VAE raises.
        """
        height, width = (VAE_FACTOR * side for side in image.latents.shape[-2:])
        pixels = self._in_memory(lambda: self._picture(image.latents), width, height)
        return edited.finished(pixels) if edited else pixels

    def latents(self, edited: EditPixels, seed: int) -> EditLatents:
        """Encode the picture of an edit. Raises the errors of `picture`."""
        height, width, _ = edited.image.shape
        return self._in_memory(lambda: self._latents(edited, seed), width, height)

    def _in_memory(self, work: Callable[[], T], width: int, height: int) -> T:
        """Do work for an image of this size in px, in several attempts if memory runs out."""
        for attempt in range(1, MEMORY_ATTEMPTS + 1):
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Not inside `except`, where the failed call's tensors are still alive.
            self.out_of_memory += 1
            self._denoiser.free_memory()
            if self._thread and attempt < MEMORY_ATTEMPTS:  # a pause here holds up no step
                time.sleep(self._memory_pause_s)
        raise no_memory(width, height)

    def preview(self, image: DenoisingState, edited: EditPixels | None = None) -> NDArray[np.uint8]:
        """An approximation of the pixels that `picture` will return."""
        with self._denoiser.beside_steps():
            pixels = to_pixels(self._denoiser.preview(image.estimate))
        return edited.finished(pixels) if edited else pixels

    def _picture(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        precision = self._denoiser.recipe.name
        with self._denoiser.beside_steps():
            if not latents.isfinite().all():
                raise NonFiniteImage(f"the model produced non-finite numbers in {precision}")
            picture = self._denoiser.decode(latents)[0]
            if not picture.isfinite().all():
                raise NonFiniteImage(f"the VAE produced non-finite numbers in {precision}")
            return to_pixels(picture)

    def _latents(self, edited: EditPixels, seed: int) -> EditLatents:
        with self._denoiser.beside_steps():
            found = self._denoiser.encode(edited, seed)
            # This also waits for the card, so the steps may use the latents from now on.
            if not found.image.isfinite().all():
                precision = self._denoiser.recipe.name
                raise NonFiniteImage(f"the VAE produced non-finite numbers in {precision}")
            return found


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out.

    CUDA's allocator has its own class for such errors; others are known by their message.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in NO_MEMORY)


def no_memory(width: int, height: int) -> Unavailable:
    """The error for an image that ran out of memory in every attempt."""
    return Unavailable(f"not enough memory to generate {width}x{height} now")
