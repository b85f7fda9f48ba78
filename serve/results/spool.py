"""Images on their way to a store that may be slow or away: on a disk until it has them."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from urllib.parse import quote, unquote

from ..atomic_file import replace_file
from ..errors import OctetError
from .store import ResultStore, folder_of

log = logging.getLogger("ray.serve")

WORKERS = 8
PATIENCE_S = 2.0  # how long a client waits for the store; then its image is safe here
LOOK_S = 1.0
BACK_OFF_S, LONGEST_S = 1.0, 60.0
PART_S = 3600.0
ABANDONED_S = 60.0  # what another process has not uploaded by then is uploaded by any


class Spool:
    """A `ResultStore` before another one.

    An image is kept as soon as it is on this disk. It is uploaded at once, or later and again with
    back-off until that succeeds; what a process leaves behind, others on its node or its successor
    upload. To upload an image twice makes no difference.
    """

    def __init__(
        self, store: ResultStore, folder: Path, max_bytes: int, *, drain: bool = True
    ) -> None:
        """Without `drain` only what is put here is uploaded.

        Raises `OSError` if the folder cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._store, self._folder, self.max_bytes = store, folder, max_bytes
        self._mine: set[Path] = set()  # and of them those that are being uploaded
        self._busy: set[Path] = set()
        self._begun = time.time()
        self._away_until, self._back_off_s = 0.0, BACK_OFF_S
        self.entries = self.bytes = 0  # as last looked, and what came and went since
        self._look()
        self._uploads = ThreadPoolExecutor(WORKERS, thread_name_prefix="upload")
        self._closed = threading.Event()
        self._drainer = threading.Thread(target=self._drain, name="spool", daemon=True)
        if drain:
            self._drainer.start()

    def check(self) -> None:
        """Raises `RuntimeError` if nobody uploads what waits."""
        if not self._drainer.is_alive():
            raise RuntimeError("the spool is no longer drained")

    @property
    def full(self) -> bool:
        """Too much waits here for images to be promised."""
        return self.bytes >= self.max_bytes

    def put(self, name: str, image: bytes, request_id: str) -> None:
        file = self._folder / quote(name, safe="")
        head = json.dumps({"request_id": request_id}).encode() + b"\n"
        self._mine.add(file)
        try:
            replace_file(file, head, image, sync=True)
        except OSError:
            self._mine.discard(file)
            log.warning("the spool cannot be written", exc_info=True)
            self._store.put(name, image, request_id)
            return
        self.bytes += len(image)
        if time.monotonic() >= self._away_until:
            self._busy.add(file)
            upload = self._uploads.submit(self._upload, file)
            try:
                upload.result(PATIENCE_S)
            except LateError:
                self._away()

    def get(self, name: str) -> bytes | str:
        with contextlib.suppress(FileNotFoundError):
            return self._waiting(name)
        return self._store.get(name)

    def read(self, name: str) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return self._waiting(name)
        return self._store.read(name)

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int) -> None:
        self._store.sweep(now, max_age_s=max_age_s, max_bytes=max_bytes)

    def erase(self, tenant: str) -> int:
        waiting = list(self._folder.glob(quote(folder_of(tenant), safe="") + "*"))
        for file in waiting:
            file.unlink(missing_ok=True)
        return len(waiting) + self._store.erase(tenant)

    def close(self) -> None:
        self._closed.set()
        self._uploads.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    def _waiting(self, name: str) -> bytes:
        return _read(self._folder / quote(name, safe=""))[1]

    def _upload(self, file: Path) -> bool:
        """Whether the store has it now, or nobody wants it any more."""
        try:
            request_id, image = _read(file)
        except FileNotFoundError:
            self._busy.discard(file)
            return True
        except (OSError, ValueError, KeyError):  # nothing will read it, and others wait behind it
            log.error("%s cannot be read; it is left as bad-…", file, exc_info=True)
            file.rename(file.with_name(f"bad-{file.name}"))
            self._busy.discard(file)
            return True
        try:
            self._store.put(unquote(file.name), image, request_id)
        except OctetError as error:
            self._away()
            log.warning("%s waits in the spool: %s", file.name, error)
            return False
        finally:
            self._busy.discard(file)
        file.unlink(missing_ok=True)
        self._mine.discard(file)
        self.bytes -= len(image)
        self._back_off_s = BACK_OFF_S
        return True

    def _away(self) -> None:
        """The store is left alone for a while."""
        if (now := time.monotonic()) >= self._away_until:
            self._away_until = now + self._back_off_s
            self._back_off_s = min(2 * self._back_off_s, LONGEST_S)

    def _drain(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                for file in self._look():
                    if time.monotonic() < self._away_until or not self._upload(file):
                        break
            except Exception:  # whatever it is, the next round may do better
                log.warning("the spool cannot be drained; trying again", exc_info=True)

    def _look(self) -> list[Path]:
        """What is to be uploaded, oldest first."""
        found, now = [], time.time()
        for part in self._folder.glob("tmp*"):  # of a process that died while it wrote
            with contextlib.suppress(FileNotFoundError):
                if now - part.stat().st_mtime > PART_S:
                    part.unlink()
        for file in self._folder.glob("t%2F*"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_mtime, status.st_size, file))
        self.entries, self.bytes = len(found), sum(size for _, size, _ in found)
        found.sort()
        return [
            file
            for at, _, file in found
            if file not in self._busy
            and (file in self._mine or now - at > ABANDONED_S or at < self._begun)
        ]


def _read(file: Path) -> tuple[str, bytes]:
    """Request id and image. Raises `OSError`, `FileNotFoundError` if it is gone."""
    head, _, image = file.read_bytes().partition(b"\n")
    request_id: str = json.loads(head)["request_id"]
    return request_id, image
