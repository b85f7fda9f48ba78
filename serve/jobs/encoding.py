"""Requests, results and errors of jobs as JSON, as the database keeps them."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from ..errors import OctetError
from ..request import ImageRequest, ImageResult, Timings


class StoredPictures(NamedTuple):
    """The names in the result store of an edit's picture and mask."""

    image: str
    mask: str | None = None


@dataclass(frozen=True)
class StoredRequest:
    """The request of a job.

    `as_b64`: whether the answer is to hold the images themselves, and not links. `pictures`: of an
    edit.
    """

    images: tuple[ImageRequest, ...]
    as_b64: bool = False
    pictures: StoredPictures | None = None

    def as_json(self) -> str:
        return _REQUESTS.dump_json(self).decode()

    @staticmethod
    def of(text: str) -> StoredRequest:
        """Read a request from `as_json`."""
        return _REQUESTS.validate_json(text)


@dataclass(frozen=True)
class StoredImage:
    """An image of a job: its name in the result store, and the fields of its `ImageResult`."""

    name: str
    seed: int
    precision: str
    emulated: bool
    text_tokens: int
    work_s: float
    timings: Timings

    @staticmethod
    def of(name: str, result: ImageResult) -> StoredImage:
        kept = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "image"}
        return StoredImage(name=name, **kept)

    def result(self, image: bytes = b"") -> ImageResult:
        """The result with the image's bytes, if they are needed."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return ImageResult(image=image, **kept)


class StoredError(NamedTuple):
    """The error with which a job ended, as it would be answered over HTTP."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None

    def as_json(self) -> str:
        return _ERRORS.dump_json(self).decode()

    @staticmethod
    def of(error: OctetError) -> StoredError:
        return StoredError(error.status, error.type, error.code, error.message, error.param)

    @staticmethod
    def read(text: str) -> StoredError:
        return _ERRORS.validate_json(text)


def is_storable(text: str) -> bool:
    """Return whether every database can hold a text, without NUL and lone surrogates."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


_REQUESTS = TypeAdapter(StoredRequest)
_IMAGES = TypeAdapter(tuple[StoredImage, ...])
_ERRORS = TypeAdapter(StoredError)


def images_as_json(images: tuple[StoredImage, ...]) -> str:
    return _IMAGES.dump_json(images).decode()


def images_of(text: str) -> tuple[StoredImage, ...]:
    """Read images from `images_as_json`."""
    return _IMAGES.validate_json(text)
