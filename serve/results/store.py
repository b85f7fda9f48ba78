"""The interface of all result stores, and the names of images."""

from __future__ import annotations

import re
import secrets
import time
from typing import Protocol

from ..tenants.tenant import ID

NAME = re.compile(rf"t/{ID.pattern}/\d{{4}}/\d\d/\d\d/[0-9a-f]{{32}}\.(png|jpeg|webp)")


def new_name(tenant: str, extension: str, now: float) -> str:
    """A new image name: t/TENANT/YYYY/MM/DD/RANDOM.EXTENSION, with the day of `now` in UTC.

    RANDOM is 128 bits in hexadecimal, so that nobody can guess it.
    """
    day = time.strftime("%Y/%m/%d", time.gmtime(now))
    return f"t/{tenant}/{day}/{secrets.token_hex(16)}.{extension}"


def folder_of(tenant: str) -> str:
    """The beginning of the names of a tenant's images. Raises `ValueError` for an invalid id."""
    if not ID.fullmatch(tenant):
        raise ValueError(
            f"'{tenant}' is no tenant's id: an id is 1 to 63 characters of a-z 0-9 -, and neither "
            "begins nor ends with -"
        )
    return f"t/{tenant}/"


class ResultStore(Protocol):
    """Keeps images by their names, as `new_name` makes them.

    Every method may block: call it in a thread.
    """

    def put(self, name: str, image: bytes, request_id: str) -> None:
        """Keep an image; keeping it twice makes no difference. Raises `StoreFailed`."""

    def get(self, name: str) -> bytes | str:
        """Return an image, or a URL under which it can be read for a while.

        Raises `NotFound` if the image is not kept, and `StoreFailed` if the store does not answer.
        """

    def read(self, name: str) -> bytes:
        """Return an image itself. Raises what `get` raises."""

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int) -> None:
        """Delete images older than `max_age_s` at `now`, in Unix time.

        A store with a bounded size also deletes the oldest images beyond `max_bytes`. Raises
        `OSError` or `StoreFailed`.
        """

    def close(self) -> None:
        """Release connections and threads; no other method may be called afterwards."""

    def erase(self, tenant: str) -> int:
        """Delete a tenant's images; returns their number.

        Raises `ValueError` for an invalid tenant id, `OSError` or `StoreFailed`.
        """
