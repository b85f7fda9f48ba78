"""Responses in the formats of OpenAI's Images API, as one body or as events.

The responses also hold Octet's own fields.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from cluster.structure import TOKEN_PX

from ...errors import OctetError
from ...request import ImageRequest, ImageResult, OutputFormat, PartialImage, Progress
from ...settings.models import Defaults, Model, Preset


class GenerationDetails(BaseModel):
    """How an image was generated: Octet's own fields."""

    seed: int
    precision: Annotated[
        str, Field(description="Precision that was used: fp8, bf16, fp16 or fp32.")
    ]
    emulated: Annotated[bool, Field(description="FP8 arithmetic without FP8 hardware.")]
    timings: Annotated[dict[str, float], Field(description="Seconds of each stage.")]
    routed_by: Annotated[
        str | None,
        Field(description="The rule of the settings that chose 16 bit because of the prompt."),
    ] = None


class ImageItem(GenerationDetails):
    """One image of the response."""

    b64_json: str | None = None
    url: str | None = None


class InputTokens(BaseModel):
    """The number of input tokens of each kind; together they are `Usage.input_tokens`.

    Image tokens are those of the pictures that are edited.
    """

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """The number of tokens of all images of a response.

    Input tokens are the text tokens that the transformer reads for each image, padding included,
    and the tokens of the picture that is edited. Output tokens are the tokens of the images.
    """

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class StreamedImage(BaseModel):
    """The fields that OpenAI's events with an image have in common."""

    b64_json: str
    created_at: int
    size: str
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    quality: Annotated[str, Field(description="The preset that was used; auto without one.")]


class PartialImageEvent(StreamedImage):
    """A preview of an image; `partial_image_index` counts from 0."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(StreamedImage, GenerationDetails):
    """A finished image; the last event of its stream."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage


class ProgressEvent(BaseModel):
    """The progress of an image; this event is Octet's own.

    While the image waits, `queue_position` is its place in the queue (1: next). After that, `step`
    of its `steps` are done. `eta_s`: seconds until the image is finished, if that is known.
    """

    type: Literal["image_generation.progress", "image_edit.progress"]
    step: int
    steps: int
    eta_s: float | None
    queue_position: int | None


class ImagesResponse(BaseModel):
    """The response to a request for images without `stream`."""

    created: int
    model: str
    size: str
    output_format: OutputFormat
    quality: Annotated[str, Field(description="The preset that was used; auto without one.")]
    data: list[ImageItem]
    usage: Usage


class ErrorDetail(BaseModel):
    """An error; `param` names the field of the request that was wrong, if there is one."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """The response for an error."""

    error: ErrorDetail


class ErrorEvent(ErrorResponse):
    """An error that ends a stream."""

    type: Literal["error"] = "error"


Event = PartialImageEvent | ProgressEvent | CompletedEvent | ErrorEvent


class CancelledRequest(BaseModel):
    """The response to `DELETE /v1/requests/ID`."""

    id: str
    object: Literal["request"] = "request"
    cancelled: Literal[True] = True


class LiftedQuarantine(BaseModel):
    """The response to `DELETE /v1/quarantine/ID`."""

    id: str
    object: Literal["quarantine"] = "quarantine"
    lifted: Literal[True] = True


class NodeCordon(BaseModel):
    """The response to `PUT` and `DELETE /v1/nodes/ID/cordon`."""

    node: Annotated[str, Field(description="Ray's whole id of the node.")]
    object: Literal["node"] = "node"
    cordoned: bool


class RequestStatus(BaseModel):
    """The response to `GET /v1/requests/ID`: where an open request is."""

    id: str
    object: Literal["request"] = "request"
    status: Annotated[
        Literal["queued", "in_progress"],
        Field(description="`queued` until an image of the request runs."),
    ]
    queued: Annotated[int, Field(description="Images that wait for a slot.")]
    running: Annotated[int, Field(description="Images that are being generated.")]
    queue_position: Annotated[
        int | None, Field(description="Place in the queue of the first image; 1 is the next.")
    ]
    age_s: Annotated[float, Field(description="Seconds since the request was admitted.")]


class UsageItem(BaseModel):
    """A usage record; `call` and `image` together with `outcome` "reversed" or not are unique."""

    id: Annotated[int, Field(description="Grows from record to record.")]
    time: str
    call: str
    image: int
    tenant: str
    request_id: str
    model: str
    precision: str
    size: str
    steps: int
    work_s: Annotated[float, Field(description="The charge, in seconds of a reference replica.")]
    outcome: str
    key_id: Annotated[str | None, Field(description="Id of the API key that asked for the image.")]
    release: Annotated[str | None, Field(description="Octet's version; null: not known.")]
    preset: Annotated[
        str | None, Field(description="The preset by which the image was cheaper; empty: none.")
    ]


class UsageList(BaseModel):
    """The response to `GET /admin/v1/usage`."""

    object: Literal["list"] = "list"
    data: list[UsageItem]
    has_more: bool
    next: Annotated[int, Field(description="The value of `after` for the records that follow.")]


def usage_list(records: Sequence[Mapping[str, Any]], has_more: bool, after: int) -> UsageList:
    """Describe a page of records; `after`: the id behind which it begins."""
    data = [UsageItem.model_validate(record) for record in records]
    return UsageList(data=data, has_more=has_more, next=data[-1].id if data else after)


class QualityItem(BaseModel):
    """How the images of one value of `quality` are generated, and what they cost."""

    sampler: str
    num_inference_steps: int
    cost: Annotated[
        float,
        Field(description="The work of an image of the default size; that of auto is 1."),
    ]


class ModelItem(BaseModel):
    """A model that is served.

    `limits`, `defaults`, `qualities` and `example_prompts` are Octet's own fields.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "octet"
    limits: Annotated[
        dict[str, int | float],
        Field(description="Largest and smallest values of requests, by name."),
    ]
    defaults: Annotated[
        dict[str, int | float | str],
        Field(description="Values of requests that name none, by name."),
    ]
    qualities: Annotated[
        dict[str, QualityItem],
        Field(description="auto, and each preset, by the value of `quality` that chooses it."),
    ]
    example_prompts: Annotated[
        list[str], Field(description="Prompts that the model knows well; may be empty.")
    ]


def model_item(
    model: Model, created: int, example_prompts: list[str], costs: Mapping[str, float]
) -> ModelItem:
    """Describe a served model.

    `created`: when, in seconds since 1970. `costs`: see `serve.models.reference_work`.
    """
    ways: dict[str, Defaults | Preset] = {"auto": model.defaults, **model.presets}
    return ModelItem(
        id=model.id,
        created=created,
        limits=asdict(model.limits),
        defaults=model.defaults.model_dump(),
        qualities={
            name: QualityItem(
                sampler=way.sampler,
                num_inference_steps=way.num_inference_steps,
                cost=round(costs[name], 3),
            )
            for name, way in ways.items()
        },
        example_prompts=example_prompts,
    )


class ModelList(BaseModel):
    """The response to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelItem]


def response(
    requests: Sequence[ImageRequest], results: Sequence[ImageResult], links: Sequence[str] = ()
) -> bytes:
    """Make an `ImagesResponse` as JSON; see `images_response`.

    This function takes milliseconds for each megabyte, so call it in a thread.
    """
    answer = images_response(requests, results, links, time.time())
    return answer.model_dump_json(exclude_none=True).encode()


def images_response(
    requests: Sequence[ImageRequest],
    results: Sequence[ImageResult],
    links: Sequence[str],
    created: float,
) -> ImagesResponse:
    """Make an `ImagesResponse`; `created`: Unix time.

    `links`: URLs, which are sent instead of the image data if there are any.
    """
    first = requests[0]
    data = [
        ImageItem(
            b64_json=None if links else _base64(result.image),
            url=links[i] if links else None,
            **_generation_details(first, result),
        )
        for i, result in enumerate(results)
    ]
    return ImagesResponse(
        created=int(created),
        model=first.model,
        size=first.size,
        output_format=first.output_format,
        quality=first.preset or "auto",
        data=data,
        usage=_usage(requests, results),
    )


def partial_image_event(request: ImageRequest, preview: PartialImage) -> PartialImageEvent:
    fields = _image_fields(request, preview.image)
    kind = _event_type(request, "partial_image")
    return PartialImageEvent(type=kind, partial_image_index=preview.index, **fields)


def completed_event(request: ImageRequest, result: ImageResult) -> CompletedEvent:
    usage = _usage([request], [result])
    fields = _image_fields(request, result.image)
    kind = _event_type(request, "completed")
    return CompletedEvent(type=kind, usage=usage, **fields, **_generation_details(request, result))


def progress_event(request: ImageRequest, progress: Progress) -> ProgressEvent:
    eta_s = None if progress.eta_s is None else round(progress.eta_s, 3)
    fields = progress._replace(eta_s=eta_s)._asdict()
    return ProgressEvent(type=_event_type(request, "progress"), **fields)


def _event_type(request: ImageRequest, name: str) -> Any:
    """The type of an event: `image_edit.NAME` for an edit, else `image_generation.NAME`."""
    return f"image_edit.{name}" if request.edit else f"image_generation.{name}"


def error_event(error: OctetError) -> ErrorEvent:
    return ErrorEvent(**error_body(error))


def error_body(error: OctetError) -> dict[str, Any]:
    """Convert an error to the fields of an `ErrorResponse`, as plain data for JSON."""
    detail = ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)
    return ErrorResponse(error=detail).model_dump()


def _usage(requests: Sequence[ImageRequest], results: Sequence[ImageResult]) -> Usage:
    """The tokens of all images together."""
    text_tokens = sum(result.text_tokens for result in results)
    tokens = [math.prod(request.canvas) // TOKEN_PX**2 for request in requests]
    read = sum(n for n, request in zip(tokens, requests, strict=True) if request.edit)
    return Usage(
        input_tokens=text_tokens + read,
        input_tokens_details=InputTokens(text_tokens=text_tokens, image_tokens=read),
        output_tokens=sum(tokens),
        total_tokens=text_tokens + read + sum(tokens),
    )


def _generation_details(request: ImageRequest, result: ImageResult) -> dict[str, Any]:
    """The fields of `GenerationDetails`."""
    return {
        "routed_by": request.routed_by or None,
        "seed": result.seed,
        "precision": result.precision,
        "emulated": result.emulated,
        "timings": {k: round(v, 4) for k, v in asdict(result.timings).items()},
    }


def _image_fields(request: ImageRequest, image: bytes) -> dict[str, Any]:
    """The fields of `StreamedImage`."""
    return {
        "b64_json": _base64(image),
        "created_at": int(time.time()),
        "size": request.size,
        "output_format": request.output_format,
        "quality": request.preset or "auto",
    }


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")
