"""OpenAI's Images API on the wire, with our own fields at top level."""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InvalidRequest, ModelNotFound, OctetError
from ..request import MAX_SEED, ImageRequest, ImageResult, OutputFormat, Precision
from ..settings import Model

RANDOM_SEEDS = 2**32  # a seed that we choose stays short enough to read out


class ImageGeneration(BaseModel):
    """The body of POST /v1/images/generations; null means "not given", as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: OutputFormat | None = None
    user: str | None = None
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    precision: Precision | None = None


def parse(body: bytes, models: Mapping[str, Model]) -> list[ImageRequest]:
    """The images that a body asks for: image i has seed + i.

    `models` by id; the first is the default. Raises `InvalidRequest` with the field's name.
    """
    try:
        asked = ImageGeneration.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    name = asked.model or next(iter(models))
    model = models.get(name)
    if model is None:
        known = ", ".join(models)
        raise ModelNotFound(f"model '{name[:80]}' does not exist: known are {known}", param="model")
    defaults, limits = model.defaults, model.request_limits
    n = asked.n or 1
    if n > limits.max_images:
        raise InvalidRequest(f"n {n} must be between 1 and {limits.max_images}", param="n")
    width, height = _size(asked.size) if asked.size else (defaults.width, defaults.height)
    seed = secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed
    steps, guidance = asked.num_inference_steps, asked.guidance_scale
    requests = [
        ImageRequest(
            id=uuid.uuid4().hex,
            model=model.id,
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt or "",
            width=width,
            height=height,
            num_inference_steps=defaults.num_inference_steps if steps is None else steps,
            guidance_scale=defaults.guidance_scale if guidance is None else guidance,
            seed=seed + i,
            precision=asked.precision or Precision.AUTO,
            output_format=asked.output_format or OutputFormat.PNG,
        )
        for i in range(n)
    ]
    requests[0].check(limits)
    return requests


def response(requests: Sequence[ImageRequest], results: Sequence[ImageResult]) -> bytes:
    """OpenAI's ImagesResponse as JSON; takes milliseconds per megabyte, so call it in a thread."""
    first = requests[0]
    data = [
        {
            "b64_json": base64.b64encode(result.image).decode("ascii"),
            "seed": result.seed,
            "precision": result.precision,
            "emulated": result.emulated,
            "timings": {k: round(v, 4) for k, v in asdict(result.timings).items()},
        }
        for result in results
    ]
    body = {
        "created": int(time.time()),
        "model": first.model,
        "size": first.size,
        "output_format": first.output_format,
        "data": data,
    }
    return json.dumps(body).encode()


def error_body(error: OctetError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not found:
        raise InvalidRequest(
            f"size '{text[:40]}' must be WIDTHxHEIGHT in pixels, such as 1024x1024", param="size"
        )
    return int(found[1]), int(found[2])


def _explain(error: ValidationError) -> InvalidRequest:
    """The first fault of a body in one sentence."""
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {fault['ctx']['error']}")
    field = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        known = ", ".join(ImageGeneration.model_fields)
        return InvalidRequest(f"unknown field '{field[:80]}': known are {known}", param=field[:80])
    if fault["type"] == "missing":
        return InvalidRequest(f"{field} is required", param=field)
    value = repr(fault["input"])
    found = value if len(value) <= 80 else value[:77] + "..."
    name = f"{field}: " if field else ""
    return InvalidRequest(f"{name}{fault['msg']} (found {found})", param=field or None)
