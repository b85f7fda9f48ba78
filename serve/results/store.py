"""The interface of all result stores, and the names of images."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from ..tenants.tenant import ID

# Images of requests are kept for a day or so under t/; those of jobs, and the pictures that jobs
# edit, are kept under j/ until their jobs are forgotten.
NAME = re.compile(rf"[tj]/{ID.pattern}/\d{{4}}/\d\d/\d\d/[0-9a-f]{{32}}\.(png|jpeg|webp)")


def new_name(tenant: str, extension: str, now: float, kind: Literal["t", "j"] = "t") -> str:
    """A new image name: KIND/TENANT/YYYY/MM/DD/RANDOM.EXTENSION, with the day of `now` in UTC.

    KIND is t for an image of a request, and j for one of a job. RANDOM is 128 bits in hexadecimal,
    so that nobody can guess it.
    """
    day = time.strftime("%Y/%m/%d", time.gmtime(now))
    return f"{kind}/{tenant}/{day}/{secrets.token_hex(16)}.{extension}"


def folders_of(tenant: str) -> tuple[str, str]:
    """The beginnings of the names of all images of a tenant.

    Raises `ValueError` if `tenant` is not a valid id.
    """
    if not ID.fullmatch(tenant):
        raise ValueError(
            f"'{tenant}' is no tenant's id: an id is 1 to 63 characters of a-z 0-9 -, and neither "
            "begins nor ends with -"
        )
    return f"t/{tenant}/", f"j/{tenant}/"


class StoreFault(NamedTuple):
    """Why images cannot be put where they belong: for the operator, not for clients.

    `place`: the bucket or the folder. `cause`: a short name of the kind of fault, such as the
    service's error code. `message`: the whole reason.
    """

    place: str
    cause: str
    message: str


class ResultStore(Protocol):
    """Keeps images by their names; `new_name` makes the names.

    Every method may block: call it in a thread. The properties do not block.
    """

    @property
    def fault(self) -> StoreFault | None:
        """The fault at the last attempt to put an image; None if that worked."""

    @property
    def full(self) -> bool:
        """Return whether no further images should be put here at the moment."""

    def put(self, name: str, image: bytes, request_id: str) -> None:
        """Keep an image; keeping it twice makes no difference.

        `request_id`: the id of its request, which a store may keep with the image. Raises
        `StoreFailed` if the image could not be stored.
        """

    def get(self, name: str) -> bytes | str:
        """Return an image, or a URL under which it can be read for a while.

        Raises `NotFound` if the image is not kept, and `StoreFailed` if the store does not answer.
        """

    def read(self, name: str) -> bytes:
        """Return the bytes of an image, never a URL. Raises the same errors as `get`."""

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int, max_job_age_s: float) -> None:
        """Delete images of requests that are older than `max_age_s` at `now`, in Unix time.

        Images of jobs are deleted when they are older than `max_job_age_s`: no job knows them any
        more. A store with a bounded size also deletes the oldest images of requests beyond
        `max_bytes`. Raises `OSError` or `StoreFailed` if the store fails.
        """

    def delete(self, names: Sequence[str]) -> None:
        """Delete these images, as far as they are there; raises the same errors as `sweep`."""

    def close(self) -> None:
        """Release connections and threads; no other method may be called afterwards."""

    def erase(self, tenant: str) -> int:
        """Delete a tenant's images; return their number.

        Raises `ValueError` for an invalid tenant id, and `OSError` or `StoreFailed` if the store
        fails.
        """
