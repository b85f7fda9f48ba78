"""Files that are replaced as a whole, so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def replace_file(
    file: Path, *parts: bytes, mode: int = 0o600, sync: bool = False, keep_owner: bool = False
) -> None:
    """Replace the file atomically, or make it if it is not there. Raises `OSError`.

    `sync`: the file and its name are on disk when this returns, also after a power cut.
    `keep_owner`: the file keeps its owner, and a new one has that of its folder, so that a server
    can read what root has written for it.
    """
    file = file.resolve()
    handle, part = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            os.fchmod(handle, mode)
            if keep_owner:
                owner = (file if file.exists() else file.parent).stat()
                with suppress(PermissionError):
                    os.fchown(handle, owner.st_uid, owner.st_gid)
            out.writelines(parts)
            if sync:
                out.flush()
                os.fsync(handle)
        Path(part).rename(file)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Write a folder's names to disk: a new file could be gone after a power cut otherwise.

    Raises `OSError`.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
