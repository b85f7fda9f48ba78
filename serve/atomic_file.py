"""Files that are replaced as a whole, so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_file(file: Path, *parts: bytes, mode: int = 0o600, sync: bool = False) -> None:
    """Write `parts` into a file atomically, in place of the file's old contents if there are any.

    `mode`: the permissions of the file. `sync`: wait until the file and its name are on disk, so
    that both survive a power cut. Raises `OSError` if the file cannot be written.
    """
    file = file.resolve()
    handle, part = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            os.fchmod(handle, mode)
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
    """Write the names of a folder's files to disk.

    A power cut could otherwise remove the name of a new file, and so the file. Raises `OSError` if
    the disk fails.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
