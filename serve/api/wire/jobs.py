"""The formats of jobs: `POST /v1/jobs`, and what is answered about a job."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ...errors import InvalidRequest, did_you_mean
from ...jobs.encoding import StoredError
from ...jobs.job import Job, State
from .paths import EDITS, GENERATIONS
from .request import explained
from .response import ErrorDetail, ImagesResponse

ENDPOINTS = {GENERATIONS: "generations", EDITS: "edits"}


class NewJobBody(BaseModel):
    """The body of `POST /v1/jobs`: a request as it would be sent to `url`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[str, Field(json_schema_extra={"enum": list(ENDPOINTS)})]
    body: dict[str, JsonValue]


class JobItem(BaseModel):
    """A job. Times are Unix times in seconds; null: not yet, or not known."""

    id: str
    object: Literal["job"] = "job"
    status: State
    endpoint: str
    model: str
    request_id: Annotated[str, Field(description="The `x-request-id` of its acceptance.")]
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: Annotated[int, Field(description="When the job ends as `expired`.")]
    queue_position: Annotated[
        int | None, Field(description="Its place in the queue; 1 is the next.")
    ] = None
    progress: Annotated[float | None, Field(description="Part of its steps that are done.")] = None
    eta_s: Annotated[float | None, Field(description="Seconds until it is done.")] = None
    batch_id: str | None = None
    custom_id: str | None = None
    result: ImagesResponse | None = None
    error: ErrorDetail | None = None


class JobList(BaseModel):
    """The response to `GET /v1/jobs`, newest first."""

    object: Literal["list"] = "list"
    data: list[JobItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


def parse_new_job(body: bytes) -> tuple[str, bytes]:
    """Parse the body of `POST /v1/jobs`; return the path and the body of its request.

    Raises `InvalidRequest` with the name of the first wrong field.
    """
    try:
        asked = NewJobBody.model_validate_json(body)
    except ValidationError as error:
        raise explained(error) from None
    if asked.url not in ENDPOINTS:
        nearest = did_you_mean(asked.url, list(ENDPOINTS))
        raise InvalidRequest(f"url '{asked.url[:80]}' takes no jobs: {nearest}", param="url")
    return asked.url, json.dumps(asked.body).encode()


def job_item(job: Job, result: ImagesResponse | None = None, **present: Any) -> JobItem:
    """Describe a job. `result`: its images; `present`: what the Dispatcher knows of it."""
    error = StoredError.read(job.error) if job.error else None
    return JobItem(
        id=job.id,
        endpoint=next(path for path, name in ENDPOINTS.items() if name == job.endpoint),
        model=job.model,
        request_id=job.request_id,
        created_at=int(job.created),
        started_at=None if job.started is None else int(job.started),
        completed_at=None if job.ended is None else int(job.ended),
        expires_at=int(job.expires),
        batch_id=job.batch,
        custom_id=job.custom_id,
        result=result,
        error=ErrorDetail(
            message=error.message, type=error.type, param=error.param, code=error.code
        )
        if error
        else None,
        **{"status": job.state, **present},
    )
