"""The result store in a folder, which all nodes with an Ingress must share."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..atomic_file import replace_file, sync_folder
from ..errors import NotFound, StoreFailed
from .store import NAME, StoreFault, folders_of

NEARLY_FULL = "the disk is nearly full"
DISK_FULL = "the disk that keeps images is full: ask for b64_json"
# Left free for other files on the disk, such as usage records: the smaller of the two.
RESERVE_BYTES, RESERVE_SHARE = 256 * 2**20, 0.05


def is_nearly_full(folder: Path) -> bool:
    """Return whether images must leave the rest of the folder's disk to other files.

    Usage records on the same disk can then still be written, and without them no image could be
    delivered in any form. Raises `OSError` if the disk fails.
    """
    disk = shutil.disk_usage(folder)
    return disk.free < min(RESERVE_BYTES, RESERVE_SHARE * disk.total)


class DiskStore:
    """Keeps images as files in `folder`/images; its methods are those of `ResultStore`."""

    def __init__(
        self,
        folder: str | Path,
        is_nearly_full: Callable[[Path], bool] = is_nearly_full,
        *,
        sync: bool = False,
    ) -> None:
        """Make the folder if needed. Raises `OSError` if that fails.

        `is_nearly_full`: whether a folder's disk has no room for images. `sync`: whether an image
        must be on disk, safe from a power cut, before `put` returns.
        """
        self._sync = sync
        self._images, self._is_nearly_full = Path(folder) / "images", is_nearly_full
        self._images.mkdir(parents=True, exist_ok=True)
        self.full = is_nearly_full(self._images)
        self._fault: StoreFault | None = None

    @property
    def fault(self) -> StoreFault | None:
        return self._fault_of(OSError(errno.ENOSPC, NEARLY_FULL)) if self.full else self._fault

    def _fault_of(self, error: OSError) -> StoreFault:
        cause = errno.errorcode.get(error.errno or 0, type(error).__name__)
        return StoreFault(f"folder {self._images}", cause, error.strerror or str(error))

    def look(self) -> None:
        """Find out whether the disk has room again."""
        self.full = self._is_nearly_full(self._images)

    def put(self, name: str, image: bytes, request_id: str) -> None:
        file = self._images / name
        try:
            self.full = self._is_nearly_full(self._images)
            if self.full:
                raise OSError(errno.ENOSPC, NEARLY_FULL)
            try:
                self._write(file, image)
            except FileNotFoundError:  # another Ingress has just deleted the day's empty folder
                self._write(file, image)
        except OSError as error:
            self._fault = self._fault_of(error)
            message = DISK_FULL if self.full else "the image could not be stored"
            raise StoreFailed(message) from error
        self._fault = None

    def _write(self, file: Path, image: bytes) -> None:
        new_folders = [f for f in (file.parent, *file.parent.parents) if not f.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, image, sync=self._sync)
        if self._sync:
            for folder in new_folders:
                sync_folder(folder.parent)

    def get(self, name: str) -> bytes:
        if NAME.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                return (self._images / name).read_bytes()
        raise NotFound("the image is no longer kept")

    read = get

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int, max_job_age_s: float) -> None:
        self.look()
        found = []
        for file in self._files():
            with contextlib.suppress(FileNotFoundError):  # another Ingress sweeps too
                status = file.stat()
                found.append((status.st_mtime, status.st_size, file))
        found.sort(reverse=True)
        total = 0
        for changed, size, file in found:
            of_job = file.relative_to(self._images).parts[0] == "j"
            total += 0 if of_job else size
            too_many = total > max_bytes and not of_job
            if now - changed > (max_job_age_s if of_job else max_age_s) or too_many:
                file.unlink(missing_ok=True)
                if file.parent != self._images:
                    with contextlib.suppress(OSError):  # the day's folder holds other images
                        file.parent.rmdir()
        if self._fault and not self.full:
            probe = self._images / "probe"
            replace_file(probe, b"")
            probe.unlink()
            self._fault = None

    def delete(self, names: Sequence[str]) -> None:
        for name in filter(NAME.fullmatch, names):
            (self._images / name).unlink(missing_ok=True)

    def erase(self, tenant: str) -> int:
        images = 0
        for folder in (self._images / name for name in folders_of(tenant)):
            if folder.is_dir():
                images += sum(file.is_file() for file in folder.rglob("*"))
                shutil.rmtree(folder)
        return images

    def close(self) -> None:
        """Do nothing: a folder need not be closed."""

    def _files(self) -> Iterator[Path]:
        for folder, _, files in os.walk(self._images, onerror=_raise):
            yield from (Path(folder) / file for file in files)


def _raise(error: OSError) -> None:
    """Re-raise an error of `os.walk`, unless another Ingress has just deleted a day's folder.

    A missing folder of all images is always an error.
    """
    if not isinstance(error, FileNotFoundError) or error.filename is None:
        raise error
    if Path(error.filename).name == "images":
        raise error
