"""A replica's part of a card: it starts only if that is free, and takes no more.

Ray's fractions of a GPU isolate nothing: this keeps replicas from taking each other's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .footprint import CONTEXT_GIB, GIB

WAIT_S = 30.0  # a predecessor that has just died may still hold what it had
POLL_S = 1.0
TOLERANCE_GIB = 0.5  # contexts are larger or smaller than assumed


class CardFull(Exception):
    """What a replica was promised is not free; the message says promised, free and total."""


class Cuda(Protocol):
    """The part of `torch.cuda` that is used here."""

    def mem_get_info(self) -> tuple[int, int]: ...
    def set_per_process_memory_fraction(self, fraction: float) -> None: ...
    def memory_allocated(self) -> int: ...
    def memory_reserved(self) -> int: ...
    def max_memory_allocated(self) -> int: ...


@dataclass(frozen=True, slots=True)
class MemoryClaim:
    """The part of this process's card that it may take; `cuda` reports what it does take."""

    promised_gib: float
    cuda: Cuda

    @property
    def taken_bytes(self) -> dict[str, int]:
        return {
            "promised": round(self.promised_gib * GIB),
            "allocated": self.cuda.memory_allocated(),
            "reserved": self.cuda.memory_reserved(),
            "peak": self.cuda.max_memory_allocated(),
        }


def is_free(promised_gib: float, free_gib: float) -> bool:
    """Whether a promise can be kept; `free_gib` is asked for in a process that has a context."""
    return promised_gib - CONTEXT_GIB <= free_gib + TOLERANCE_GIB


def claim(
    cuda: Cuda,
    num_gpus: float,
    memory_gib: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> MemoryClaim:
    """Cap this process at `memory_gib` of its card, by default the part that `num_gpus` says.

    Blocks for up to `WAIT_S` until so much is free. Raises `CardFull`. CUDA's context lies outside
    torch's allocator and exists by the time that free memory can be asked for.
    """
    waited_s = 0.0
    while True:
        free_gib, total_gib = (n / GIB for n in cuda.mem_get_info())
        promised_gib = memory_gib or min(num_gpus, 1.0) * total_gib
        if is_free(promised_gib, free_gib):
            break
        if waited_s >= WAIT_S:
            raise CardFull(
                f"promised {promised_gib:.1f} GiB of the card, and {free_gib + CONTEXT_GIB:.1f} of "
                f"{total_gib:.1f} are free: other processes hold the rest (nvidia-smi names them)"
            )
        sleep(POLL_S)
        waited_s += POLL_S
    needed_gib = promised_gib - CONTEXT_GIB
    if needed_gib <= 0:
        raise CardFull(f"promised {promised_gib:.1f} GiB, and CUDA's context alone takes as much")
    cuda.set_per_process_memory_fraction(min(needed_gib / total_gib, 1.0))
    return MemoryClaim(promised_gib, cuda)
