"""A full disk, simulated for the files of this process."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

# Python ignores the signal that goes with the limit, so a write beyond it raises `OSError`.
LARGEST = 1


@contextmanager
def full_disk(bytes_left: int = LARGEST) -> Iterator[None]:
    """Let no file of this process grow beyond `bytes_left` bytes until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
