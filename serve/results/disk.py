"""Images in a folder, read through `/v1/files/` with links that are signed and expire.

All Ingress replicas on the folder's file system share it and its signing key; on several nodes
the folder must be a shared one.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from pathlib import Path

from ..errors import LinkInvalid, NotFound, StoreFailed

NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp)")
KEY_BYTES = 32


class DiskStore:
    """See `ResultStore`."""

    def __init__(self, folder: str | Path) -> None:
        """Raises `OSError` if the folder cannot be made or written to."""
        root = Path(folder).expanduser()
        self._images = root / "images"
        self._images.mkdir(parents=True, exist_ok=True)
        self._key = _shared_key(root / "signing-key")

    def put(self, image: bytes, extension: str) -> str:
        name = f"{secrets.token_urlsafe(24)}.{extension}"
        try:
            _write(self._images / name, image)
        except OSError as error:
            raise StoreFailed("the image could not be stored") from error
        return name

    def link(self, name: str, expires: int) -> str:
        return f"/v1/files/{name}?expires={expires}&signature={self._sign(name, str(expires))}"

    def read(self, name: str, expires: str, signature: str, now: float) -> bytes:
        expected = self._sign(name, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
            raise LinkInvalid("the link's signature is wrong")
        if float(expires) < now:
            raise LinkInvalid("the link has expired")
        if NAME.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                return (self._images / name).read_bytes()
        raise NotFound("the image is no longer kept")

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int) -> None:
        found = []
        for entry in os.scandir(self._images):
            with contextlib.suppress(FileNotFoundError):  # another Ingress sweeps too
                if entry.is_file():
                    found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        found.sort(reverse=True)
        total = 0
        for changed, size, path in found:
            total += size
            if now - changed > max_age_s or total > max_bytes:
                Path(path).unlink(missing_ok=True)

    def _sign(self, name: str, expires: str) -> str:
        text = f"{name}\n{expires}".encode(errors="replace")
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all, whoever reads meanwhile."""
    handle, part = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        Path(part).rename(file)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise


def _shared_key(file: Path) -> bytes:
    """The folder's key; the first process to need it makes it, readable by its user alone."""
    handle, part = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(secrets.token_bytes(KEY_BYTES))
    try:
        with contextlib.suppress(FileExistsError):
            os.link(part, file)
    finally:
        Path(part).unlink()
    return file.read_bytes()
