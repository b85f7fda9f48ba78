"""The request body of `POST /v1/images/edits`, and its translation into image requests.

The format is that of OpenAI's Images API, as a form or as JSON, with Octet's own fields beside
theirs.
"""

from __future__ import annotations

import binascii
import hashlib
import math
import re
from base64 import b64decode
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from ...edit_pixels import EditPixels
from ...errors import BodyTooLarge, InvalidRequest
from ...request import SIZE_MULTIPLE_PX, Edit, ModelLimits
from ...settings.application import EditSettings, Settings
from .multipart import FormPart, form_parts
from .picture import Picture, Size
from .request import (
    SHOWN_CHARS,
    GenerationRequest,
    ImageFields,
    Unsupported,
    check_unknown,
    explained,
    generation_request,
    parsed_json,
    served_model,
    size_of,
)

FORM, JSON = "multipart/form-data", "application/json"
# Clients write `image`, `image[]` or `image[0]` for the same field.
FILE = re.compile(r"(image|mask)(?:\[\d*\])?")
DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
STRENGTH, STRENGTH_WITH_MASK = 0.6, 1.0  # diffusers' default, and to repaint all that may change


class EditFields(ImageFields):
    """The fields of an edit apart from its files: `strength` is Octet's own."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None

    # OpenAI's fields that change nothing here, or cannot be served.
    input_fidelity: Literal["low"] | None = None
    markup: Unsupported = None

    @field_validator("input_fidelity", mode="before")
    @classmethod
    def _is_not_high(cls, value: object) -> object:
        if value == "high":
            raise PydanticCustomError("unsupported", "this model has no high input fidelity")
        return value


class ImageReference(BaseModel):
    """A picture inside the body. No other URL is ever read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: Annotated[str, Field(description="data:image/png;base64,…")]
    file_id: Unsupported = None


class ImageEdit(EditFields):
    """The JSON body of POST /v1/images/edits; `images` holds exactly one."""

    images: list[ImageReference]
    mask: ImageReference | None = None


class _Upload(NamedTuple):
    """A body after the first part of its parsing: fields, and files whose content is not known."""

    asked: EditFields
    image: bytes
    mask: bytes | None


def parse_edit(
    body: bytes,
    content_type: str,
    live: Settings,
    request_id: str = "request",
    default_timeout_s: float | None = None,
) -> GenerationRequest:
    """Parse the body of an edit, a form or JSON, and read its picture and mask.

    The result has the size that the request names, or else that of the picture. This takes up to a
    second, so call it in a thread. Raises `InvalidRequest` with the name of the first wrong field,
    `BodyTooLarge` for a file with too many bytes, `ModelNotFound` for an unknown model, and
    `Unavailable` without enough memory.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (FORM, JSON, ""):
        raise InvalidRequest(f"content-type '{kind[:SHOWN_CHARS]}' must be {FORM} or {JSON}")
    upload = _form(body, content_type, live) if kind == FORM else _json(body, live)
    asked, limits = upload.asked, live.edits
    model = served_model(asked, live)
    for data, most, param in (
        (upload.image, limits.max_image_bytes, "image"),
        (upload.mask or b"", limits.max_mask_bytes, "mask"),
    ):
        if len(data) > most:
            raise BodyTooLarge(f"{param} is larger than {most} bytes", param=param)
    picture = Picture(upload.image, "image", limits.max_pixels)
    size = Size(*size_of(asked) or fitted(picture.size, model.limits, model.id))
    usual = STRENGTH if upload.mask is None else STRENGTH_WITH_MASK
    edit = Edit(strength=usual if asked.strength is None else asked.strength, image_sha256="")
    # Checked before the picture is scaled to this size.
    parsed = generation_request(asked, model, live, size, request_id, default_timeout_s, edit)
    edited = _pixels(picture, upload.mask, size, limits)
    return _with_pixels(parsed, edit, edited)


def _form(body: bytes, content_type: str, live: Settings) -> _Upload:
    """Parse a form: its files, and the texts of all other fields."""
    texts: dict[str, str] = {}
    files: dict[str, list[FormPart]] = {"image": [], "mask": []}
    unknown = []
    for part in form_parts(body, content_type):
        name = part.name
        if match := FILE.fullmatch(name):
            if not part.is_file:
                raise InvalidRequest(f"{match[1]} must be sent as a file", param=match[1])
            files[match[1]].append(part)
        elif name not in EditFields.model_fields:
            unknown.append(name)
        elif part.is_file:
            raise InvalidRequest(f"{name} is not supported as a file", param=name)
        elif name in texts:
            raise InvalidRequest(f"{name} is given twice", param=name)
        else:
            texts[name] = _text(part)
    check_unknown(unknown, [*files, *EditFields.model_fields], live)
    for name, parts in files.items():
        if len(parts) > 1:
            raise _several(name, len(parts))
    if not files["image"]:
        raise InvalidRequest("image is required", param="image")
    try:
        asked = EditFields.model_validate_strings(
            {**texts, **dict.fromkeys(unknown, "")}, strict=True, extra="allow"
        )
    except ValidationError as error:
        raise explained(error) from None
    mask = files["mask"][0].content if files["mask"] else None
    return _Upload(asked, files["image"][0].content, mask)


def _text(part: FormPart) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{part.name} is not UTF-8 at byte {error.start}", param=part.name
        ) from None


def _several(name: str, number: int) -> InvalidRequest:
    return InvalidRequest(f"{number} files for {name}: this model edits one image", param=name)


def _json(body: bytes, live: Settings) -> _Upload:
    """Parse a JSON body, which holds its files as data: URLs."""
    asked = parsed_json(ImageEdit, body, live)
    if len(asked.images) != 1:
        raise _several("images", len(asked.images))
    mask = None if asked.mask is None else _data(asked.mask, "mask")
    return _Upload(asked, _data(asked.images[0], "images"), mask)


def _data(reference: ImageReference, param: str) -> bytes:
    """The bytes in a data: URL."""
    url = reference.image_url
    if not (match := DATA_URL.match(url)):
        raise InvalidRequest(
            f"{param}: image_url '{url[:SHOWN_CHARS]}' must be a data: URL in base64; other URLs "
            "are not read",
            param=param,
        )
    try:
        return b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{param}: image_url is no valid base64", param=param) from None


def _pixels(picture: Picture, mask: bytes | None, size: Size, limits: EditSettings) -> EditPixels:
    """The pixels of the picture and the mask. Raises `InvalidRequest` for an unusable mask."""
    if mask is None:
        return EditPixels(picture.colours(size))
    opened = Picture(mask, "mask", limits.max_pixels)
    if opened.size != picture.size:
        raise InvalidRequest(
            f"mask is {opened.size} and image is {picture.size}: they must have the same size",
            param="mask",
        )
    edited = EditPixels(picture.colours(size), opened.alpha(size))
    if edited.repainted is None or not edited.repainted.any():
        raise InvalidRequest(
            "mask is opaque, so nothing would be edited: make it transparent where the picture "
            "is to be repainted",
            param="mask",
        )
    return edited


def _with_pixels(parsed: GenerationRequest, edit: Edit, edited: EditPixels) -> GenerationRequest:
    kept = edited.kept
    edit = replace(
        edit,
        image_sha256=_digest(edited.image),
        mask_sha256=None if kept is None else _digest(kept),
    )
    images = [replace(image, edit=edit) for image in parsed.images]
    return replace(parsed, images=images, edited=edited)


def _digest(pixels: NDArray[np.uint8]) -> str:
    return hashlib.sha256(pixels.data).hexdigest()


def fitted(size: Size, limits: ModelLimits, model: str) -> Size:
    """The size of the answer for a picture of this size, if the request names none.

    That is the picture's own. A picture that is too large for the model is scaled down, to
    multiples of 16 px. Raises `InvalidRequest` if the picture is too small then.
    """
    canvas = [-(-side // SIZE_MULTIPLE_PX) * SIZE_MULTIPLE_PX for side in size]
    found = size
    if max(canvas) > limits.max_size_px or math.prod(canvas) > limits.max_pixels:
        areas = limits.max_pixels / math.prod(size)
        share = min(limits.max_size_px / max(size), math.sqrt(areas), 1.0)
        found = Size(*(int(side * share) // SIZE_MULTIPLE_PX * SIZE_MULTIPLE_PX for side in size))
    if min(found) < limits.min_size_px:
        raise InvalidRequest(
            f"image is {size}: {model} generates images with sides from {limits.min_size_px} to "
            f"{limits.max_size_px} px",
            param="image",
        )
    return found
