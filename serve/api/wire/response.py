"""What OpenAI's Images API answers, in one body or as events, with fields of our own beside it."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from cluster.structure import TOKEN_PX

from ...errors import OctetError
from ...request import ImageRequest, ImageResult, OutputFormat, PartialImage, Progress


class Made(BaseModel):
    """How an image was made; ours."""

    seed: int
    precision: Annotated[str, Field(description="What ran: fp8, bf16, fp16 or fp32.")]
    emulated: Annotated[bool, Field(description="FP8 arithmetic without FP8 hardware.")]
    timings: Annotated[dict[str, float], Field(description="Seconds of each stage.")]


class ImageItem(Made):
    """One image of the answer."""

    b64_json: str | None = None
    url: str | None = None


class InputTokens(BaseModel):
    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Tokens that the transformer reads for an image (text, padding and all) and draws."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class StreamedImage(BaseModel):
    """What OpenAI's events say of a picture."""

    b64_json: str
    created_at: int
    size: str
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"


class PartialImageEvent(StreamedImage):
    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedEvent(StreamedImage, Made):
    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage


class ProgressEvent(BaseModel):
    """Waiting at a place in the queue (1: next), or `step` of `steps` done; ours."""

    type: Literal["image_generation.progress"] = "image_generation.progress"
    step: int
    steps: int
    eta_s: float | None
    queue_position: int | None


class ImagesResponse(BaseModel):
    created: int
    model: str
    size: str
    output_format: OutputFormat
    data: list[ImageItem]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    error: ErrorDetail


class ErrorEvent(ErrorResponse):
    type: Literal["error"] = "error"


Event = PartialImageEvent | ProgressEvent | CompletedEvent | ErrorEvent


class CancelledRequest(BaseModel):
    """The answer to DELETE /v1/requests/ID."""

    id: str
    object: Literal["request"] = "request"
    cancelled: Literal[True] = True


class ModelItem(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "octet"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelItem]


def response(
    requests: Sequence[ImageRequest], results: Sequence[ImageResult], links: Sequence[str] = ()
) -> bytes:
    """`ImagesResponse` as JSON, with `links` in place of the images if there are any.

    Takes milliseconds per megabyte, so call it in a thread.
    """
    first = requests[0]
    data = [
        ImageItem(
            b64_json=None if links else _base64(result.image),
            url=links[i] if links else None,
            **_made(result),
        )
        for i, result in enumerate(results)
    ]
    answer = ImagesResponse(
        created=int(time.time()),
        model=first.model,
        size=first.size,
        output_format=first.output_format,
        data=data,
    )
    return answer.model_dump_json(exclude_none=True).encode()


def partial_image_event(request: ImageRequest, preview: PartialImage) -> PartialImageEvent:
    shown = _streamed(request, preview.image)
    return PartialImageEvent(partial_image_index=preview.index, **shown)


def completed_event(request: ImageRequest, result: ImageResult) -> CompletedEvent:
    text, image = result.text_tokens, request.width * request.height // TOKEN_PX**2
    usage = Usage(
        input_tokens=text,
        input_tokens_details=InputTokens(text_tokens=text),
        output_tokens=image,
        total_tokens=text + image,
    )
    return CompletedEvent(usage=usage, **_streamed(request, result.image), **_made(result))


def progress_event(progress: Progress) -> ProgressEvent:
    eta_s = None if progress.eta_s is None else round(progress.eta_s, 3)
    return ProgressEvent(**progress._replace(eta_s=eta_s)._asdict())


def error_event(error: OctetError) -> ErrorEvent:
    return ErrorEvent(**error_body(error))


def error_body(error: OctetError) -> dict[str, Any]:
    detail = ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)
    return ErrorResponse(error=detail).model_dump()


def _made(result: ImageResult) -> dict[str, Any]:
    return {
        "seed": result.seed,
        "precision": result.precision,
        "emulated": result.emulated,
        "timings": {k: round(v, 4) for k, v in asdict(result.timings).items()},
    }


def _streamed(request: ImageRequest, image: bytes) -> dict[str, Any]:
    return {
        "b64_json": _base64(image),
        "created_at": int(time.time()),
        "size": request.size,
        "output_format": request.output_format,
    }


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")
