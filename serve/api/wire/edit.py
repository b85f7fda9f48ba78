"""The request body of `POST /v1/images/edits`, and its translation into image requests.

The format is that of OpenAI's Images API, as a form or as JSON, with Octet's own fields beside
OpenAI's.
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
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...edit_pixels import EditPixels
from ...errors import BodyTooLarge, InvalidRequest
from ...request import SIZE_MULTIPLE_PX, Edit, ModelLimits, canvas_of
from ...settings.application import Settings
from .multipart import FormPart, form_parts
from .picture import MASK_IS, Picture, Size
from .request import (
    SHOWN_CHARS,
    GenerationRequest,
    ImageFields,
    Unsupported,
    check_call,
    check_unknown,
    explained,
    generation_request,
    parsed_json,
    served_model,
    size_of,
)

FORM, JSON = "multipart/form-data", "application/json"
# Clients write `image`, `image[]` or `image[0]` for the same field.
FILE = re.compile(r"(image|mask)(?:\[[0-9]*\])?")
DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
# The first is diffusers' default. With a mask all steps run, so that nothing of the repainted part
# is left.
STRENGTH, STRENGTH_WITH_MASK = 0.6, 1.0


class EditFields(ImageFields):
    """The fields of an edit apart from its files: `strength` is Octet's own."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None

    # OpenAI's fields that change nothing here, or cannot be served.
    input_fidelity: Literal["low"] | None = None
    markup: Unsupported = None


class ImageReference(BaseModel):
    """A picture as a data: URL in base64. URLs of other kinds are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: Annotated[str, Field(description="data:image/png;base64,…")]
    file_id: Unsupported = None


class ImageEdit(EditFields):
    """The JSON body of POST /v1/images/edits; `images` must hold exactly one picture."""

    images: Annotated[list[ImageReference], Field(json_schema_extra={"minItems": 1, "maxItems": 1})]
    mask: ImageReference | None = None


class _Upload(NamedTuple):
    """The fields of a body, and the bytes of its files before they are read as pictures.

    `others`: the size in bytes of everything but the picture and the mask.
    """

    asked: EditFields
    image: bytes
    mask: bytes | None
    others: int


def parse_edit(
    body: bytes,
    content_type: str,
    live: Settings,
    request_id: str = "request",
    default_timeout_s: float | None = None,
) -> tuple[GenerationRequest, EditPixels]:
    """Parse the body of an edit, a form or JSON, and read its picture and mask.

    The images have the size that the request names, or else that of the picture, scaled down if the
    model needs it. This takes up to a second or two, so call it in a thread. Raises
    `InvalidRequest` with the name of the first wrong field, `BodyTooLarge` for a file with too many
    bytes, `ModelNotFound` for an unknown model, and `Unavailable` if there is not enough memory to
    read the picture.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (FORM, JSON, ""):
        raise InvalidRequest(f"content-type '{kind[:SHOWN_CHARS]}' must be {FORM} or {JSON}")
    asked, image, mask, others = (
        _form(body, content_type, live) if kind == FORM else _json(body, live)
    )
    limits, model = live.edits, served_model(asked, live)
    check_call(asked, model, live)
    for size_bytes, most, what in (
        (len(image), limits.max_image_bytes, "image"),
        (len(mask or b""), limits.max_mask_bytes, "mask"),
        (others, live.max_body_bytes, ""),
    ):
        if size_bytes > most:
            name = what or "everything but image and mask"
            raise BodyTooLarge(f"{name} is larger than {most} bytes", param=what or None)
    usual = STRENGTH if mask is None else STRENGTH_WITH_MASK
    edit = Edit(strength=usual if asked.strength is None else asked.strength, image_sha256="")
    named = size_of(asked)
    # All fields are checked before the picture is read and scaled to the size that is named.
    size = named or (model.defaults.width, model.defaults.height)
    parsed = generation_request(asked, model, live, size, request_id, default_timeout_s, edit)
    size, edited = _pixels(image, mask, named, live, model.limits, model.id)
    kept = edited.kept
    edit = replace(
        edit,
        image_sha256=_digest(edited.image),
        mask_sha256=None if kept is None else _digest(kept),
    )
    width, height = size
    images = [replace(image, width=width, height=height, edit=edit) for image in parsed.images]
    return replace(parsed, images=images), edited


def _form(body: bytes, content_type: str, live: Settings) -> _Upload:
    """Parse a form: its files, and the texts of all other fields."""
    texts: dict[str, str] = {}
    files: dict[str, list[FormPart]] = {"image": [], "mask": []}
    unknown, others = [], 0
    for part in form_parts(body, content_type):
        name = part.name
        if match := FILE.fullmatch(name):
            if not part.is_file:
                raise InvalidRequest(f"{match[1]} must be sent as a file", param=match[1])
            files[match[1]].append(part)
            continue
        others += len(part.content)
        if name not in EditFields.model_fields:
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
    return _Upload(asked, files["image"][0].content, mask, others)


def _text(part: FormPart) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{part.name} is not UTF-8 at byte {error.start}", param=part.name
        ) from None


def _several(name: str, number: int) -> InvalidRequest:
    return InvalidRequest(
        f"{name}: found {number}, but this model takes one picture and at most one mask",
        param=name,
    )


def _json(body: bytes, live: Settings) -> _Upload:
    """Parse a JSON body, which holds its files as data: URLs."""
    asked = parsed_json(ImageEdit, body, live)
    if len(asked.images) != 1:
        raise _several("images", len(asked.images))
    references = [asked.images[0], *([asked.mask] if asked.mask else [])]
    for reference in references:
        unknown = tuple(reference.model_extra or ())
        check_unknown(unknown, ImageReference.model_fields, live)
        if asked.model_extra is not None:  # so that they are named as ignored
            asked.model_extra.update(dict.fromkeys(unknown))
    others = len(body) - sum(len(reference.image_url) for reference in references)
    mask = None if asked.mask is None else _data(asked.mask, "mask")
    image = _data(asked.images[0], "images")
    asked.images, asked.mask = [], None  # their text is large
    return _Upload(asked, image, mask, others)


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


def _pixels(
    image: bytes,
    mask: bytes | None,
    named: tuple[int, int] | None,
    live: Settings,
    limits: ModelLimits,
    model: str,
) -> tuple[Size, EditPixels]:
    """Read the picture and the mask, one after the other; returns their size and pixels.

    `named`: the size that the request names. Raises `InvalidRequest` for an unusable file.
    """
    most = live.edits.max_pixels
    picture = Picture(image, "image", most)
    sent = picture.size
    size = Size(*named) if named else fitted(sent, limits, model)
    colours = picture.colours(size)
    if mask is None:
        return size, EditPixels(colours)
    del picture  # it takes far more memory than its scaled pixels
    opened = Picture(mask, "mask", most)
    if opened.size != sent:
        raise InvalidRequest(
            f"mask is {opened.size} and image is {sent}: they must have the same size",
            param="mask",
        )
    edited = EditPixels(colours, opened.alpha(size))
    if edited.repainted is None or not edited.repainted.any():
        raise InvalidRequest(
            f"no pixel of mask is at least half transparent at {size}, so nothing would be "
            f"repainted: {MASK_IS}",
            param="mask",
        )
    return size, edited


def _digest(pixels: NDArray[np.uint8]) -> str:
    return hashlib.sha256(pixels.data).hexdigest()


def fitted(size: Size, limits: ModelLimits, model: str) -> Size:
    """The size of the answer to a request that names no size: that of the picture.

    A picture that is too large for the model is scaled down, to multiples of 16 px. Raises
    `InvalidRequest` if a side is shorter than the model's smallest then.
    """
    canvas = canvas_of(*size)
    found, longest = size, max(size)
    if max(canvas) > limits.max_size_px or math.prod(canvas) > limits.max_pixels:
        by_area = math.isqrt(limits.max_pixels * longest // min(size))
        most = min(longest, limits.max_size_px, by_area)
        whole = (side * most // longest // SIZE_MULTIPLE_PX * SIZE_MULTIPLE_PX for side in size)
        found = Size(*whole)
    if min(found) < limits.min_size_px:
        raise InvalidRequest(
            f"image is {size}: {model} generates images with sides from {limits.min_size_px} to "
            f"{limits.max_size_px} px",
            param="image",
        )
    return found
