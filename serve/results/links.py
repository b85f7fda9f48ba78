"""Links to images: signed, so that who was told one may read it until it expires."""

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
    """All Ingress replicas sign with the same key."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def link(self, name: str, expires: int) -> str:
        """Path and query under which an image is read until `expires`, Unix time."""
        return f"/v1/files/{name}?expires={expires}&signature={self._sign(name, str(expires))}"

    def check(self, name: str, expires: str, signature: str, now: float) -> None:
        """Raises `LinkInvalid` if it is not ours, or its time is over."""
        expected = self._sign(name, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
            raise LinkInvalid("the link's signature is wrong")
        if float(expires) < now:
            raise LinkInvalid("the link has expired")

    def _sign(self, name: str, expires: str) -> str:
        text = f"{name}\n{expires}".encode(errors="replace")
        return hmac.new(self.key, text, hashlib.sha256).hexdigest()


def shared_key(file: Path) -> bytes:
    """The key in a file; the first process to need it makes it, readable by its user alone.

    Raises `OSError`, and `ValueError` if it is too short.
    """
    if not file.exists():
        _make_key(file)
    return read_key(file)


def read_key(file: Path) -> bytes:
    """Raises `OSError`, and `ValueError` if it is too short."""
    key = file.read_bytes()
    if len(key) < KEY_BYTES:
        raise ValueError(f"{file}: a key has at least {KEY_BYTES} bytes")
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
