"""What a result store does, whichever keeps the images, and how images are named."""

from __future__ import annotations

import re
import secrets
import time
from typing import Protocol

from ..tenants.tenant import ID

NAME = re.compile(rf"t/{ID.pattern}/\d{{4}}/\d\d/\d\d/[0-9a-f]{{32}}\.(png|jpeg|webp)")


def new_name(tenant: str, extension: str, now: float) -> str:
    """By tenant and day (UTC), and with 128 bits that nobody can guess."""
    day = time.strftime("%Y/%m/%d", time.gmtime(now))
    return f"t/{tenant}/{day}/{secrets.token_hex(16)}.{extension}"


def folder_of(tenant: str) -> str:
    """Where all names of a tenant's images begin. Raises `ValueError` for what is no id."""
    if not ID.fullmatch(tenant):
        raise ValueError(f"'{tenant}' is no tenant's id: a-z 0-9 -")
    return f"t/{tenant}/"


class ResultStore(Protocol):
    """Every call may block: use a thread. Names are those of `new_name`."""

    def put(self, name: str, image: bytes, request_id: str) -> None:
        """Keep an image; again makes no difference. Raises `StoreFailed`."""

    def get(self, name: str) -> bytes | str:
        """An image, or a URL where it can be read for a while.

        Raises `NotFound`, and `StoreFailed` if nobody knows.
        """

    def read(self, name: str) -> bytes:
        """An image itself. Raises what `get` raises."""

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int) -> None:
        """Delete what is too old at `now`, in Unix time, and what is too much if that is bounded.

        Raises `OSError` or `StoreFailed`.
        """

    def close(self) -> None:
        """Nothing more will be asked."""

    def erase(self, tenant: str) -> int:
        """Delete a tenant's images; returns how many.

        Raises `ValueError` for what is no tenant's id, `OSError` or `StoreFailed`.
        """
