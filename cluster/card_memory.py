"""A replica's part of a card's memory: checked before the start, and never exceeded.

A replica starts only if its part is free. Ray counts fractions of a GPU but does not enforce them.
The cap that is set here keeps replicas from taking each other's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .footprint import CONTEXT_GIB, GIB

WAIT_S = 30.0  # a replica that has just died may hold its memory for a while
POLL_S = 1.0
TOLERANCE_GIB = 0.5  # CUDA's context may be larger or smaller than `CONTEXT_GIB` assumes


class CardFull(Exception):
    """The memory that a replica was promised is not free.

    The message names the promised, free and total GiB.
    """


class Cuda(Protocol):
    """The part of `torch.cuda` that this file uses."""

    def mem_get_info(self) -> tuple[int, int]: ...
    def set_per_process_memory_fraction(self, fraction: float) -> None: ...
    def memory_allocated(self) -> int: ...
    def memory_reserved(self) -> int: ...
    def max_memory_allocated(self) -> int: ...


@dataclass(frozen=True, slots=True)
class MemoryClaim:
    """The memory that this process may take of its card; `cuda` reports what the process takes."""

    promised_gib: float
    cuda: Cuda

    @property
    def taken_bytes(self) -> dict[str, int]:
        """Bytes promised to this process, and bytes that torch's allocator holds, by kind."""
        return {
            "promised": round(self.promised_gib * GIB),
            "allocated": self.cuda.memory_allocated(),
            "reserved": self.cuda.memory_reserved(),
            "peak": self.cuda.max_memory_allocated(),
        }


def is_free(promised_gib: float, free_gib: float) -> bool:
    """Return whether the card has the memory that a replica was promised.

    `free_gib` is measured in a process that already has a CUDA context. So the memory of that
    context is no longer part of `free_gib`, and is taken off the promise.
    """
    return promised_gib - CONTEXT_GIB <= free_gib + TOLERANCE_GIB


def claim(
    cuda: Cuda,
    num_gpus: float,
    memory_gib: float | None = None,
    wait_s: float = WAIT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> MemoryClaim:
    """Cap this process at `memory_gib` of its card, by default at the fraction `num_gpus` of it.

    Blocks for up to `wait_s` seconds until that much memory is free. Raises `CardFull` if it is
    still not free then, or if the promise is too small for CUDA's context alone. `sleep`: the
    function that waits between two looks.

    CUDA's context lies outside torch's allocator, and it exists as soon as free memory can be
    measured. So the allocator is capped at the promised memory less `CONTEXT_GIB`.
    """
    waited_s = 0.0
    while True:
        free_gib, total_gib = (n / GIB for n in cuda.mem_get_info())
        promised_gib = memory_gib or min(num_gpus, 1.0) * total_gib
        if is_free(promised_gib, free_gib):
            break
        if waited_s >= wait_s:
            raise CardFull(
                f"promised {promised_gib:.1f} GiB of the card, and {free_gib + CONTEXT_GIB:.1f} of "
                f"{total_gib:.1f} GiB are free: other processes hold the rest (nvidia-smi names "
                "them)"
            )
        sleep(POLL_S)
        waited_s += POLL_S
    needed_gib = promised_gib - CONTEXT_GIB
    if needed_gib <= 0:
        raise CardFull(
            f"promised {promised_gib:.1f} GiB, and CUDA's context alone takes {CONTEXT_GIB:g} GiB"
        )
    cuda.set_per_process_memory_fraction(min(needed_gib / total_gib, 1.0))
    return MemoryClaim(promised_gib, cuda)
