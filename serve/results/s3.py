"""The result store in a bucket of Amazon S3, or of a service that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ..errors import NotFound, StoreFailed
from ..settings.application import S3Settings
from .store import NAME, StoreFault, folders_of, new_name

CONNECT_S, READ_S, ATTEMPTS = 2.0, 5.0, 3  # by default boto3 tries a dead endpoint for 5 min
CONNECTIONS = 32
SWEEP_EVERY_S = 3600.0
DAY_S = 86400.0
MOST_DELETED = 1000  # objects of one request
PROBE = "octet-probe"


class S3Store:
    """Keeps images as objects of a bucket; its methods are those of `ResultStore`.

    `sweep` ignores `max_bytes`: the bucket may grow without a bound.
    """

    full = False

    def __init__(self, settings: S3Settings, read_s: float = READ_S) -> None:
        """Make a client of the bucket.

        boto3 finds the credentials: in the environment, in its files, or by the node's or pod's
        role. `read_s`: how long an attempt waits for the next bytes of an answer, in seconds.
        """
        self._bucket, self._presigned_s = settings.bucket, settings.presigned_s
        self.fault: StoreFault | None = None
        self._swept = -SWEEP_EVERY_S
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region,
            config=Config(
                connect_timeout=CONNECT_S,
                read_timeout=read_s,
                retries={"mode": "standard", "max_attempts": ATTEMPTS},
                max_pool_connections=CONNECTIONS,
                signature_version="s3v4",
            ),
        )
        self._put_options = {
            key: value
            for key, value in (
                ("ServerSideEncryption", settings.server_side_encryption),
                ("SSEKMSKeyId", settings.kms_key_id),
                ("StorageClass", settings.storage_class),
            )
            if value
        }

    def probe(self) -> None:
        """Write, read and delete a small object of the tenant `PROBE`.

        Raises `StoreFailed` with the reason if one of these does not work.
        """
        name = new_name(PROBE, "png", time.time())
        for what, call in (
            ("write", lambda: self.put(name, b"probe", "octet")),
            ("read", lambda: self.read(name)),
            ("delete", lambda: self.erase(PROBE)),
        ):
            try:
                call()
            except (StoreFailed, NotFound) as error:
                reason = error.__cause__ or error
                raise StoreFailed(f"bucket {self._bucket}: cannot {what}: {reason}") from error

    def put(self, name: str, image: bytes, request_id: str) -> None:
        digest = hashlib.sha256(image).digest()
        try:
            self._client.put_object(
                Bucket=self._bucket,
                Key=name,
                Body=image,
                ContentType=f"image/{name.rpartition('.')[2]}",
                ChecksumSHA256=base64.b64encode(digest).decode(),
                Metadata={"request-id": request_id, "sha256": digest.hex()},
                **self._put_options,
            )
        except (BotoCoreError, ClientError) as error:
            code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
            place, cause = f"bucket {self._bucket}", code or type(error).__name__
            # Without the image's name, the faults of several images are one.
            self.fault = StoreFault(place, cause, str(error).replace(f"/{name}", ""))
            raise StoreFailed("the image could not be stored") from error
        self.fault = None

    def get(self, name: str) -> str:
        with self._location(name) as location:
            self._client.head_object(**location)
            url: str = self._client.generate_presigned_url(
                "get_object", Params=location, ExpiresIn=self._presigned_s
            )
        return url

    def read(self, name: str) -> bytes:
        with self._location(name) as location, self._client.get_object(**location)["Body"] as body:
            image: bytes = body.read()
        return image

    @contextmanager
    def _location(self, name: str) -> Iterator[dict[str, str]]:
        """Give the block an image's bucket and key, and translate boto3's errors in the block.

        Raises `NotFound` if the bucket does not have the image, and `StoreFailed` for any other
        error.
        """
        if not NAME.fullmatch(name):
            raise NotFound("the image is no longer kept")
        try:
            yield {"Bucket": self._bucket, "Key": name}
        except ClientError as error:
            if error.response["ResponseMetadata"].get("HTTPStatusCode") == 404:
                raise NotFound("the image is no longer kept") from None
            raise StoreFailed("the store does not answer") from error
        except BotoCoreError as error:
            raise StoreFailed("the store does not answer") from error

    def sweep(self, now: float, *, max_age_s: float, max_bytes: int, max_job_age_s: float) -> None:
        """Delete the images of each day on which all images are older than their greatest age.

        A call within an hour of the last sweep does nothing.
        """
        if now - self._swept < SWEEP_EVERY_S:
            return
        for kind, age_s in (("t/", max_age_s), ("j/", max_job_age_s)):
            last = time.strftime("%Y/%m/%d", time.gmtime(now - age_s - DAY_S))
            for tenant in self._folders(kind):
                for year in self._folders(tenant):
                    for month in self._folders(year):
                        for day in self._folders(month):
                            if day.removeprefix(tenant).rstrip("/") <= last:
                                self._delete(day)
        self._swept = now

    def delete(self, names: Sequence[str]) -> None:
        valid = [name for name in names if NAME.fullmatch(name)]
        for begin in range(0, len(valid), MOST_DELETED):
            self._delete_objects(valid[begin : begin + MOST_DELETED])

    def erase(self, tenant: str) -> int:
        return sum(map(self._delete, folders_of(tenant)))

    def close(self) -> None:
        self._client.close()

    def _folders(self, prefix: str) -> list[str]:
        return [
            folder["Prefix"]
            for page in self._pages(prefix, Delimiter="/")
            for folder in page.get("CommonPrefixes", ())
        ]

    def _delete(self, prefix: str) -> int:
        """Delete all objects whose keys begin with `prefix`; return their number.

        Raises `StoreFailed` if the store does not answer or does not delete all of them.
        """
        deleted = 0
        for page in self._pages(prefix):
            names = [found["Key"] for found in page.get("Contents", ())]
            self._delete_objects(names)
            deleted += len(names)
        return deleted

    def _delete_objects(self, names: Sequence[str]) -> None:
        """Delete at most `MOST_DELETED` objects."""
        if not names:
            return
        try:
            response = self._client.delete_objects(
                Bucket=self._bucket,
                Delete={"Objects": [{"Key": name} for name in names], "Quiet": True},
            )
        except (BotoCoreError, ClientError) as error:
            raise StoreFailed("the store does not answer") from error
        if response.get("Errors"):
            raise StoreFailed(f"{len(response['Errors'])} images could not be deleted")

    def _pages(self, prefix: str, **more: str) -> Iterator[Any]:
        pages = self._client.get_paginator("list_objects_v2")
        try:
            yield from pages.paginate(Bucket=self._bucket, Prefix=prefix, **more)
        except (BotoCoreError, ClientError) as error:
            raise StoreFailed("the store does not answer") from error
