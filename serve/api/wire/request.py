"""The request body of `POST /v1/images/generations`, and its translation into image requests.

The format is that of OpenAI's Images API, with Octet's own fields at the top level. `edit` parses
the bodies of edits with the shared functions of this file.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, LiteralString, TypeVar
from urllib.parse import quote

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError, from_json

from ...errors import InvalidRequest, ModelNotFound, did_you_mean
from ...request import (
    MAX_SEED,
    Edit,
    ImageRequest,
    OutputFormat,
    Precision,
    Sampler,
    StreamOptions,
)
from ...settings.application import Settings
from ...settings.models import Model

RANDOM_SEEDS = 2**32  # seeds that the server chooses are below this: short enough to read out
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
MANY = 10**6  # above every limit of a model; keeps absurd numbers out of error messages
SHOWN_CHARS = 80  # how much of a client's text an error message repeats
MOST_PREVIEWS = 3

Unsupported = Annotated[None, Field(description="Not supported.")]
Ignored = Annotated[str | None, Field(description="Accepted and ignored.")]
# By field: OpenAI's value that no model here can serve, and the reason.
REFUSED: dict[str, tuple[str, LiteralString]] = {
    "background": ("transparent", "the images of this model are opaque"),
    "input_fidelity": ("high", "this model has no high input fidelity"),
}
Fields = TypeVar("Fields", bound="ImageFields")


class ImageFields(BaseModel):
    """The fields that all requests for images have; null means "not given", as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MANY)] | None = None
    size: Annotated[str, Field(json_schema_extra={"pattern": SIZE})] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    quality: Annotated[
        str | None,
        Field(
            description="auto, high, hd and standard: the model's default. medium, low, and other "
            "names that GET /v1/models lists: its presets that cost less. A request that states "
            "num_inference_steps or sampler uses no preset."
        ),
    ] = None

    # Octet's own fields.
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MANY)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    sampler: Sampler | None = None
    precision: Precision | None = None
    deterministic: bool | None = None
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    progress: Annotated[bool, Field(description="With stream: also progress events.")] | None = None

    # OpenAI's fields that change nothing here.
    user: Ignored = None
    safety_identifier: Ignored = None
    complexity: Ignored = None
    background: Literal["auto", "opaque"] | None = None

    # OpenAI's fields for streaming.
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MOST_PREVIEWS)] | None = None

    # OpenAI's fields that cannot be served.
    frame_count: Unsupported = None
    frame_duration_ms: Unsupported = None
    svg: Unsupported = None

    @field_validator(*REFUSED, mode="before", check_fields=False)
    @classmethod
    def _can_be_served(cls, value: object, info: ValidationInfo) -> object:
        refused, reason = REFUSED[str(info.field_name)]
        if value == refused:
            raise PydanticCustomError("unsupported", reason)
        return value


class ImageGeneration(ImageFields):
    """The body of POST /v1/images/generations."""

    # OpenAI's fields that change nothing here.
    moderation: Ignored = None
    style: Ignored = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A parsed request body: its images, and the form and deadline of the answer.

    `seeded`: whether the client chose the seed. `as_url`: whether to answer with URLs instead of
    image data; `as_b64`: whether the client named the image data. `timeout_s`: seconds until the
    deadline. `shortened`: whether the client made that time shorter than the default. `stream`:
    whether to answer with events. `ignored`: the body's unknown fields, if the settings allow them.
    """

    images: list[ImageRequest]
    seeded: bool
    as_url: bool
    timeout_s: float
    shortened: bool
    stream: bool
    options: StreamOptions
    ignored: tuple[str, ...] = ()
    as_b64: bool = False

    def check_stored(self) -> None:
        """Raise `InvalidRequest` if this cannot be a job."""
        if self.stream:
            raise InvalidRequest("stream: a job has no stream; see its events", param="stream")


def parse(
    body: bytes,
    live: Settings,
    request_id: str = "request",
    default_timeout_s: float | None = None,
) -> GenerationRequest:
    """Parse the body of a request for new images.

    Raises `InvalidRequest` with the name of the first wrong field, and `ModelNotFound` for an
    unknown model. `generation_request` describes the arguments and the result.
    """
    asked = parsed_json(ImageGeneration, body, live)
    model = served_model(asked, live)
    check_call(asked, model, live)
    size = size_of(asked) or (model.defaults.width, model.defaults.height)
    return generation_request(asked, model, live, size, request_id, default_timeout_s)


def parsed_json(cls: type[Fields], body: bytes, live: Settings) -> Fields:
    """Parse the fields of a JSON body; unknown fields are in `model_extra`, if they are allowed."""
    try:
        asked = cls.model_validate_json(body, extra="allow")
    except ValidationError as error:
        # A misspelt name may explain a missing field.
        check_unknown(_unknown_fields(body, cls), cls.model_fields, live)
        raise explained(error) from None
    check_unknown(tuple(asked.model_extra or ()), cls.model_fields, live)
    return asked


def served_model(asked: ImageFields, live: Settings) -> Model:
    """The model of a request; without a name the first model of the settings.

    Raises `ModelNotFound` for an unknown model.
    """
    models = {model.id: model for model in live.models}
    name = next(iter(models), "") if asked.model is None else asked.model
    model = models.get(name)
    if model is None:
        raise model_not_found(name, live)
    return model


def check_call(asked: ImageFields, model: Model, live: Settings) -> None:
    """Raise `InvalidRequest` if `n`, `timeout_s` or the fields of streams cannot be served."""
    most, longest_s = model.limits.max_images, live.request_timeout_s
    if asked.n and asked.n > most:
        raise InvalidRequest(f"n {asked.n} must be between 1 and {most}", param="n")
    if asked.timeout_s and asked.timeout_s > longest_s:
        raise InvalidRequest(
            f"timeout_s {asked.timeout_s:g} must be at most {longest_s:g}", param="timeout_s"
        )
    _check_streaming(asked)


def generation_request(
    asked: ImageFields,
    model: Model,
    live: Settings,
    size: tuple[int, int],
    request_id: str,
    default_timeout_s: float | None,
    edit: Edit | None = None,
) -> GenerationRequest:
    """Translate parsed fields into one or more image requests for a served model.

    Image i gets the seed + i and the id `request_id/i`. A body without `timeout_s` gets
    `default_timeout_s`, but at most `request_timeout_s` of the settings. `size`: width and height
    in px. `edit`: the strength and digests of an edit; None for a generation. Raises
    `InvalidRequest` with the name of the first wrong field.
    """
    defaults, longest_s = model.defaults, live.request_timeout_s
    default_s = min(default_timeout_s or longest_s, longest_s)
    width, height = size
    seed = secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed
    guidance = asked.guidance_scale
    preset, sampler, steps = _sampling(asked, model)
    precision, rule = asked.precision or Precision.AUTO, ""
    if precision is Precision.AUTO and (rule := model.routed_by(asked.prompt)):
        precision = Precision.FP16
    images = [
        ImageRequest(
            id=f"{request_id}/{i}",
            model=model.id,
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt or "",
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance_scale if guidance is None else guidance,
            seed=seed + i,
            precision=precision,
            output_format=asked.output_format or OutputFormat.PNG,
            output_compression=asked.output_compression,
            deterministic=bool(asked.deterministic),
            edit=edit,
            sampler=sampler,
            preset=preset,
            routed_by=rule,
        )
        for i in range(asked.n or 1)
    ]
    images[0].check(model.limits)
    return GenerationRequest(
        images=images,
        seeded=asked.seed is not None,
        as_url=asked.response_format == "url",
        timeout_s=asked.timeout_s or default_s,
        shortened=asked.timeout_s is not None and asked.timeout_s < default_s,
        stream=bool(asked.stream),
        options=StreamOptions(
            progress=bool(asked.progress), partial_images=asked.partial_images or 0
        ),
        ignored=tuple(asked.model_extra or ()),
        as_b64=asked.response_format == "b64_json",
    )


def _sampling(asked: ImageFields, model: Model) -> tuple[str, Sampler, int]:
    """The preset of a request, "" without one; its sampler; and its number of steps.

    A request that states its own sampler or steps uses no preset. Raises `InvalidRequest` for a
    quality that the model does not have.
    """
    quality, defaults = asked.quality or "auto", model.defaults
    if quality not in model.qualities:
        nearest = did_you_mean(quality, model.qualities)
        raise InvalidRequest(
            f"quality '{quality[:SHOWN_CHARS]}' does not exist: {nearest}", param="quality"
        )
    if asked.sampler or asked.num_inference_steps is not None:
        steps = asked.num_inference_steps or defaults.num_inference_steps
        return "", asked.sampler or defaults.sampler, steps
    if preset := model.presets.get(quality):
        return quality, preset.sampler, preset.num_inference_steps
    return "", defaults.sampler, defaults.num_inference_steps


def _check_streaming(asked: ImageFields) -> None:
    n = asked.n or 1
    if not asked.stream:
        for name in ("partial_images", "progress"):
            if getattr(asked, name):
                raise InvalidRequest(f"{name} needs stream: true", param=name)
    elif n > 1:
        raise InvalidRequest(f"n {n} must be 1 with stream: true", param="n")
    elif asked.response_format == "url":
        raise InvalidRequest(
            "response_format 'url' must be b64_json with stream: true", param="response_format"
        )


def reason_of(body: bytes) -> str:
    """The `reason` in the body of an operator's request; a default text for an empty body.

    Raises `InvalidRequest` if the body is not {"reason": TEXT}.
    """
    try:
        found = from_json(body) if body else {}
        reason = found.get("reason", "by an operator")
        if not isinstance(reason, str) or found.keys() - {"reason"}:
            raise ValueError
    except (ValueError, AttributeError):
        raise InvalidRequest('the body must be {"reason": TEXT}, or empty') from None
    return reason[:200]


def check_request_id(given: str) -> None:
    """Raise `InvalidRequest` if a client's `x-request-id` does not match `REQUEST_ID`."""
    if not REQUEST_ID.fullmatch(given):
        raise InvalidRequest(
            f"x-request-id '{given[:SHOWN_CHARS]}' must be 1 to 64 characters of "
            "A-Z a-z 0-9 . _ : -",
            param="x-request-id",
        )


def ignored_header(fields: Sequence[str]) -> dict[str, str]:
    """The header `x-octet-ignored` with the names of ignored fields; empty without `fields`.

    The names are percent-encoded. At most 20 names and 1000 characters are sent, because gateways
    refuse long headers.
    """
    names = ", ".join(quote(name[:SHOWN_CHARS], errors="replace") for name in fields[:20])
    return {"x-octet-ignored": names[:1000]} if fields else {}


def model_not_found(name: str, live: Settings) -> ModelNotFound:
    """The error for an unknown model; its message suggests the model with the nearest name."""
    nearest = did_you_mean(name, [model.id for model in live.models])
    return ModelNotFound(f"model '{name[:SHOWN_CHARS]}' does not exist: {nearest}", param="model")


def size_of(asked: ImageFields) -> tuple[int, int] | None:
    """The requested width and height in px; None if the request leaves the size to the server.

    Raises `InvalidRequest` for a size that is neither auto nor WIDTHxHEIGHT.
    """
    text = asked.size
    if text is None or text == "auto":
        return None
    if not re.fullmatch(SIZE, text):
        raise InvalidRequest(
            f"size '{text[:SHOWN_CHARS]}' must be auto, or WIDTHxHEIGHT in pixels",
            param="size",
        )
    width, height = text.split("x")
    return int(width), int(height)


def check_unknown(unknown: Sequence[str], known: Collection[str], live: Settings) -> None:
    """Raise `InvalidRequest` for unknown fields, unless the settings allow them."""
    if unknown and not live.ignore_unknown_fields:
        nearest = did_you_mean(unknown[0], known)
        field = unknown[0][:SHOWN_CHARS]
        raise InvalidRequest(f"unknown field '{field}': {nearest}", param=field)


def _unknown_fields(body: bytes, cls: type[ImageFields]) -> tuple[str, ...]:
    """The names of a body's unknown fields. Raises `InvalidRequest` if it is no JSON object."""
    try:
        data = from_json(body)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(data).__name__}")
    return tuple(name for name in data if name not in cls.model_fields)


def explained(error: ValidationError) -> InvalidRequest:
    """The error that describes the first fault of a body in one sentence."""
    fault = error.errors(include_url=False)[0]
    field = ".".join(map(str, fault["loc"]))[:SHOWN_CHARS]
    if fault["type"] == "missing":
        return InvalidRequest(f"{field} is required", param=field)
    if fault["type"] == "none_required":
        return InvalidRequest(f"{field} is not supported", param=field)
    name = f"{field}: " if field else ""
    found = _shown(fault["input"])
    return InvalidRequest(f"{name}{fault['msg']} (found {found})", param=field or None)


def _shown(value: object) -> str:
    """A short text for a value of any size, made in little time."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    text = repr(value[:SHOWN_CHARS] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
