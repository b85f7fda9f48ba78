"""A disk that is full, as far as files of this process are concerned."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

# Python ignores the signal that goes with the limit, so a write beyond it raises `OSError`.
LARGEST = 1


@contextmanager
def full_disk(bytes_left: int = LARGEST) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
