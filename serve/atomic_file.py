"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(file: Path, *parts: bytes, sync: bool = False) -> None:
    """In place of what was there, whoever reads meanwhile; `sync`: on disk when this returns.

    Only its user can read it. Raises `OSError`.
    """
    handle, part = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.writelines(parts)
            if sync:
                out.flush()
                os.fsync(out.fileno())
        Path(part).rename(file)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Else a file that is new here may be gone after a power cut. Raises `OSError`."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
