"""Signed links to images: everybody who has one may read its image until the link expires."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

from ..errors import LinkInvalid

KEY_BYTES = 32


class Links:
    """Signs links and checks them; all Ingress replicas use the same key."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def link(self, name: str, expires: int) -> str:
        """The path and query of a URL that reads image `name` until `expires`, in Unix time."""
        return f"/v1/files/{name}?expires={expires}&signature={self._sign(name, str(expires))}"

    def check(self, name: str, expires: str, signature: str, now: float) -> None:
        """Raise `LinkInvalid` if a link has a wrong signature or has expired by `now`."""
        expected = self._sign(name, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
            raise LinkInvalid("the link's signature is wrong")
        if float(expires) < now:
            raise LinkInvalid("the link has expired")

    def _sign(self, name: str, expires: str) -> str:
        text = f"{name}\n{expires}".encode(errors="replace")
        return hmac.new(self.key, text, hashlib.sha256).hexdigest()


def shared_key(file: Path) -> bytes:
    """Read the key in a file; if there is no file, make it first, readable by its owner alone.

    Processes that start together agree on one key: the first to make the file wins. Raises
    `OSError` if the file cannot be read or made, and `ValueError` if the key is too short.
    """
    if not file.exists():
        _make_key(file)
    return read_key(file)


def read_key(file: Path) -> bytes:
    """Read the key in a file.

    Raises `OSError` if the file cannot be read, and `ValueError` if the key is too short.
    """
    key = file.read_bytes()
    if len(key) < KEY_BYTES:
        raise ValueError(f"{file}: the key has {len(key)} bytes, and needs at least {KEY_BYTES}")
    return key


def _make_key(file: Path) -> None:
    handle, part = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(secrets.token_bytes(KEY_BYTES))
    try:
        with contextlib.suppress(FileExistsError):
            os.link(part, file)
    finally:
        Path(part).unlink()
