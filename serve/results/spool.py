"""The spool: images on this node's disk until a store that may be slow or unreachable has them."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from urllib.parse import quote, unquote

from ..atomic_file import replace_file
from ..errors import OctetError
from .disk import is_nearly_full
from .store import ResultStore, StoreFault, folders_of

log = logging.getLogger("ray.serve")

WORKERS = 8
PATIENCE_S = 2.0  # how long a client waits for the upload; its image is safe on disk before that
LOOK_S = 1.0  # between two looks into the folder
BACK_OFF_S, LONGEST_S = 1.0, 60.0  # the first pause after a failed upload, and the longest
PART_S = 3600.0  # age at which a temporary file counts as left behind
ABANDONED_S = 60.0  # age at which a process also uploads images that another one has put here


class Spool:
    """A `ResultStore` that writes images to disk first, then uploads them to another store.

    An image counts as kept once it is on this node's disk. It is uploaded at once. A failed upload
    is repeated with back-off until it succeeds. Images that a process leaves behind are uploaded by
    other processes on its node, or by its successor. Uploading an image twice makes no difference.
    """

    def __init__(
        self,
        store: ResultStore,
        folder: Path,
        max_bytes: int,
        *,
        drain: bool = True,
        is_nearly_full: Callable[[Path], bool] = is_nearly_full,
    ) -> None:
        """Open the spool in `folder`, for uploads to `store`.

        `max_bytes`: with this many bytes waiting, the spool is full. `drain`: whether to repeat
        failed uploads, and to upload what earlier processes have left. Without it each image that
        is put here is uploaded once. `is_nearly_full`: whether a folder's disk has no room for
        images. Raises `OSError` if the folder cannot be made.
        """
        self._is_nearly_full = is_nearly_full
        folder.mkdir(parents=True, exist_ok=True)
        self._store, self._folder, self.max_bytes = store, folder, max_bytes
        self._mine: set[Path] = set()  # files that this process has put here
        self._busy: set[Path] = set()  # files that are being uploaded
        self._begun = time.time()
        self._paused_until, self._back_off_s = 0.0, BACK_OFF_S
        # The images that waited at the last look; `bytes` is also updated between two looks.
        self.entries = self.bytes = 0
        self._look()
        self._uploads = ThreadPoolExecutor(WORKERS, thread_name_prefix="upload")
        self._closed = threading.Event()
        self._drainer = threading.Thread(target=self._drain, name="spool", daemon=True)
        if drain:
            self._drainer.start()

    def check(self) -> None:
        """Raise `RuntimeError` if the thread that uploads waiting images has ended."""
        if not self._drainer.is_alive():
            raise RuntimeError("the spool is no longer drained")

    @property
    def fault(self) -> StoreFault | None:
        return self._store.fault

    @property
    def full(self) -> bool:
        """Return whether `max_bytes` or more wait here: no further images should be accepted."""
        return self.bytes >= self.max_bytes

    def put(self, name: str, image: bytes, request_id: str) -> None:
        file = self._folder / quote(name, safe="")
        head = json.dumps({"request_id": request_id}).encode() + b"\n"
        self._mine.add(file)
        try:
            if self._is_nearly_full(self._folder):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace_file(file, head, image, sync=True)
        except OSError:
            self._mine.discard(file)
            log.warning("cannot write to the spool; uploading directly", exc_info=True)
            self._store.put(name, image, request_id)
            return
        self.bytes += len(image)
        if time.monotonic() >= self._paused_until:
            self._busy.add(file)
            upload = self._uploads.submit(self._upload, file)
            try:
                upload.result(PATIENCE_S)
            except LateError:
                self._pause()

    def get(self, name: str) -> bytes | str:
        with contextlib.suppress(FileNotFoundError):
            return self._waiting(name)
        return self._store.get(name)

    def read(self, name: str) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return self._waiting(name)
        return self._store.read(name)

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int, max_job_age_s: float) -> None:
        self._store.sweep(
            now, max_age_s=max_age_s, max_bytes=max_bytes, max_job_age_s=max_job_age_s
        )

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            (self._folder / quote(name, safe="")).unlink(missing_ok=True)
        self._store.delete(names)

    def erase(self, tenant: str) -> int:
        waiting = [f for name in folders_of(tenant) for f in self._waiting_of(name)]
        for file in waiting:
            file.unlink(missing_ok=True)
        return len(waiting) + self._store.erase(tenant)

    def close(self) -> None:
        self._closed.set()
        self._uploads.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    def _waiting_of(self, folder: str) -> Iterator[Path]:
        return self._folder.glob(quote(folder, safe="") + "*")

    def _waiting(self, name: str) -> bytes:
        return _read(self._folder / quote(name, safe=""))[1]

    def _upload(self, file: Path) -> bool:
        """Upload a file and delete it; return False if the upload failed and has to be repeated.

        A file that is gone already needs nothing more. A damaged file is renamed, so that it does
        not hold up the others.
        """
        try:
            request_id, image = _read(file)
        except FileNotFoundError:
            self._busy.discard(file)
            return True
        except (OSError, ValueError, KeyError):  # set aside, so that other files are not held up
            log.error("cannot read %s; renaming it to bad-…", file, exc_info=True)
            file.rename(file.with_name(f"bad-{file.name}"))
            self._busy.discard(file)
            return True
        try:
            self._store.put(unquote(file.name), image, request_id)
        except OctetError as error:
            self._pause()
            log.warning("%s stays in the spool: %s", file.name, error.__cause__ or error)
            return False
        finally:
            self._busy.discard(file)
        file.unlink(missing_ok=True)
        self._mine.discard(file)
        self.bytes -= len(image)
        self._back_off_s = BACK_OFF_S
        return True

    def _pause(self) -> None:
        """Begin no uploads for a while; the pauses double, up to `LONGEST_S`."""
        if (now := time.monotonic()) >= self._paused_until:
            self._paused_until = now + self._back_off_s
            self._back_off_s = min(2 * self._back_off_s, LONGEST_S)

    def _drain(self) -> None:
        """Upload waiting images until the spool is closed; runs in its own thread."""
        while not self._closed.wait(LOOK_S):
            try:
                for file in self._look():
                    if time.monotonic() < self._paused_until or not self._upload(file):
                        break
            except Exception:  # on any error, the next round tries again
                log.warning("cannot drain the spool; trying again", exc_info=True)

    def _look(self) -> list[Path]:
        """Count the waiting images; return those that this process is to upload, oldest first."""
        found, now = [], time.time()
        for part in self._folder.glob("tmp*"):  # left by a process that died while it wrote
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
    """Read a file's request id and image.

    Raises `FileNotFoundError` if the file has been uploaded or erased, another `OSError` if the
    disk fails, and `ValueError` or `KeyError` if its first line is damaged.
    """
    head, _, image = file.read_bytes().partition(b"\n")
    request_id: str = json.loads(head)["request_id"]
    return request_id, image
