"""From latents to pixels: finished images and previews of others, and memory that does not suffice.

On a card a thread of its own does it, on a stream beside the next steps. On a CPU it happens
between steps, in the loop's thread: two threads that compute there slow each other down by more
than they save. Images are decoded one by one, because several in one call would round differently
with their company.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import NonFiniteImage, Unavailable
from .preview import VAE_FACTOR
from .sd3 import Denoiser, DenoisingState, to_pixels

MEMORY_ATTEMPTS = 3  # of an image alone, each with the allocator's own memory given back before
PAUSE_S = 0.5  # between them: something else may be taking the memory
NO_MEMORY = "out of memory", "can't allocate memory", "ALLOC_FAILED"  # of CUDA, the CPU, cuBLAS


class Decoding:
    """`beside`: whether in a thread of its own; by default, if the card can do both."""

    def __init__(self, denoiser: Denoiser, beside: bool | None = None) -> None:
        self._denoiser = denoiser
        self.out_of_memory = 0  # decodes for which it did not suffice
        self._thread: ThreadPoolExecutor | None = None
        if denoiser.on_cuda if beside is None else beside:
            self._thread = ThreadPoolExecutor(
                1, "decoding", initializer=torch.set_flush_denormal, initargs=(True,)
            )

    def submit(self, work: Callable[[], None]) -> None:
        """Do what must not hold up the next step: there, or else here and now."""
        if self._thread:
            self._thread.submit(work)
        else:
            work()

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def picture(self, image: DenoisingState) -> NDArray[np.uint8]:
        """Pixels (height_px, width_px, 3) of a finished image.

        Raises `NonFiniteImage`, `Unavailable` for want of memory, or what the VAE raises.
        """
        for attempt in range(1, MEMORY_ATTEMPTS + 1):
            try:
                return self._picture(image.latents)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Not within `except`: there the failed call's tensors are still alive.
            self.out_of_memory += 1
            self._denoiser.free_memory()
            if self._thread and attempt < MEMORY_ATTEMPTS:  # else all others would pause with it
                time.sleep(PAUSE_S)
        height, width = (VAE_FACTOR * side for side in image.latents.shape[-2:])
        raise no_memory(width, height)

    def preview(self, image: DenoisingState) -> NDArray[np.uint8]:
        """About the pixels that `picture` will have."""
        with self._denoiser.beside_steps():
            return to_pixels(self._denoiser.preview(image.estimate))

    def _picture(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        precision = self._denoiser.recipe.name
        with self._denoiser.beside_steps():
            if not latents.isfinite().all():
                raise NonFiniteImage(f"the model produced non-finite numbers in {precision}")
            picture = self._denoiser.decode(latents)[0]
            if not picture.isfinite().all():
                raise NonFiniteImage(f"the VAE produced non-finite numbers in {precision}")
            return to_pixels(picture)


def is_out_of_memory(error: Exception) -> bool:
    """CUDA's allocator has an exception of its own, others only a message."""
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in NO_MEMORY)


def no_memory(width: int, height: int) -> Unavailable:
    return Unavailable(f"not enough memory to draw {width}x{height} now")
