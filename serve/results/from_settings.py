"""The store and the links that settings ask for."""

from __future__ import annotations

import logging
from pathlib import Path

from ..settings.application import ApplicationSettings
from .disk import DiskStore
from .links import Links, read_key, shared_key
from .store import ResultStore

log = logging.getLogger("ray.serve")


def open_store(settings: ApplicationSettings, *, drain: bool = True) -> ResultStore:
    """`drain`: upload what waits here from before.

    Raises `OSError` if its folder cannot be used.
    """
    folder = Path(str(settings.data_folder)).expanduser()
    if settings.s3 is None:
        if any(folder.glob("spool/t*")):
            log.error("images wait in %s for a bucket that the settings do not name", folder)
        return DiskStore(folder)
    from .s3 import S3Store  # boto3 takes its time
    from .spool import Spool

    bucket = S3Store(settings.s3)
    return Spool(bucket, folder / "spool", settings.s3.spool_bytes, drain=drain)


def open_links(settings: ApplicationSettings) -> Links:
    """Raises `OSError` or `ValueError` if there is no key."""
    if settings.signing_key_file:
        return Links(read_key(Path(settings.signing_key_file).expanduser()))
    return Links(shared_key(Path(f"{settings.data_folder}/signing-key").expanduser()))
