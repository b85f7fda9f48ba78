"""What a result store does, whichever keeps the images."""

from __future__ import annotations

from typing import Protocol


class ResultStore(Protocol):
    """Every call may block: use a thread. `now` is in seconds of Unix time."""

    def put(self, image: bytes, extension: str) -> str:
        """Keep an image; returns its name, which nobody can guess. Raises `StoreFailed`."""

    def link(self, name: str, expires: int) -> str:
        """Path and query, or the whole URL, under which the image is read until `expires`."""

    def read(self, name: str, expires: str, signature: str, now: float) -> bytes:
        """The image behind a link to us. Raises `LinkInvalid` or `NotFound`."""

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int) -> None:
        """Delete what is too old, then the oldest beyond `max_bytes`. Raises `OSError`."""
