"""Opening the result store and the link signer that the settings name."""

from __future__ import annotations

import logging
from pathlib import Path

from ..settings.application import FrontSettings
from .disk import DiskStore
from .links import Links, read_key, shared_key
from .store import ResultStore

log = logging.getLogger("ray.serve")


def open_store(
    settings: FrontSettings, *, drain: bool = True, durable: bool = False
) -> ResultStore:
    """Open the result store of the settings: a folder, or a bucket behind a spool.

    `drain`: whether the spool also repeats failed uploads, and uploads images that earlier
    processes have left on this node. `durable`: an image that was put must survive the loss of this
    node's power, or with a bucket of the node: there is no spool then. Raises `OSError` if the
    folder cannot be used.
    """
    folder = Path(str(settings.data_folder)).expanduser()
    if settings.s3 is None:
        if any(folder.glob("spool/t*")):
            log.error(
                "images in %s wait for their upload, but the settings name no s3 bucket", folder
            )
        return DiskStore(folder, sync=durable)
    from .s3 import S3Store  # importing boto3 takes long
    from .spool import Spool

    bucket = S3Store(settings.s3)
    if durable:
        return bucket
    return Spool(bucket, folder / "spool", settings.s3.spool_bytes, drain=drain)


def open_links(settings: FrontSettings) -> Links:
    """The signer of links to images.

    The key is in `signing_key_file` if the settings name that file, else in the data folder. Raises
    `OSError` if the key cannot be read, and `ValueError` if it is too short.
    """
    if settings.signing_key_file:
        return Links(read_key(Path(settings.signing_key_file).expanduser()))
    return Links(shared_key(Path(f"{settings.data_folder}/signing-key").expanduser()))
