"""The formats of files and batches, which are those of OpenAI's API."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import InvalidRequest, OctetError
from ...jobs.batch_rows import Batch, BatchState
from ...jobs.encoding import StoredError
from ...jobs.files import StoredFile
from ...jobs.job import Job
from .paths import GENERATIONS
from .request import explained
from .response import ErrorDetail, ErrorResponse

LEAST_EXPIRY_S, MOST_EXPIRY_S = 3600, 30 * 86400


class FileItem(BaseModel):
    """A file. `bytes`: null for the files of a batch, which are written when they are read."""

    id: str
    object: Literal["file"] = "file"
    bytes: int | None
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """The response to `GET /v1/files`, newest first."""

    object: Literal["list"] = "list"
    data: list[FileItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """The response to `DELETE /v1/files/ID`."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ExpiresAfter(BaseModel):
    """When the files of a batch expire: so many seconds after they were made."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LEAST_EXPIRY_S, le=MOST_EXPIRY_S)]


class NewBatchBody(BaseModel):
    """The body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: Annotated[str, Field(max_length=64, pattern="^[A-Za-z0-9_-]+$")]
    endpoint: Literal["/v1/images/generations"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(BaseModel):
    """Why a batch's file cannot be used; `line`: from 1, of the lines that are not blank."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(BaseModel):
    """The faults of a batch's file."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """The lines of a batch. `completed` and `failed` have ended; so have expired ones."""

    total: int
    completed: int
    failed: int


class BatchItem(BaseModel):
    """A batch. Times are Unix times in seconds; null: not yet."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchState
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """The response to `GET /v1/batches`, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


def parse_batch(body: bytes) -> NewBatchBody:
    """Parse the body of `POST /v1/batches`; raises `InvalidRequest` with the first wrong field."""
    try:
        return NewBatchBody.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if fault["loc"] == ("endpoint",) and fault["type"] == "literal_error":
            raise InvalidRequest(f"endpoint must be {GENERATIONS}", param="endpoint") from None
        raise explained(error) from None


def file_item(file: StoredFile) -> FileItem:
    return FileItem(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created),
        expires_at=None if file.expires is None else int(file.expires),
        filename=file.name,
        purpose=file.purpose,
    )


def batch_item(batch: Batch, output: str | None, error: str | None) -> BatchItem:
    """Describe a batch; `output`, `error`: the ids of its files."""
    times, errors = json.loads(batch.times), json.loads(batch.errors)
    states = (
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "expired",
        "cancelling",
        "cancelled",
    )
    fields = {
        "id": batch.id,
        "endpoint": batch.endpoint,
        "errors": {"data": errors} if errors else None,
        "input_file_id": batch.input_file,
        "status": batch.state,
        "output_file_id": output,
        "error_file_id": error,
        "created_at": int(batch.created),
        "expires_at": int(batch.expires),
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "metadata": json.loads(batch.metadata),
        **{f"{state}_at": int(times[state]) if state in times else None for state in states},
    }
    return BatchItem.model_validate(fields)


ENDED_WITHOUT = {  # by the state of a line that was not answered
    "expired": ("batch_expired", "the batch expired before this line was done"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was done"),
}


def output_line(job: Job, body: dict[str, Any] | None, unread: OctetError | None = None) -> bytes:
    """A line of a batch's output or error file.

    `body`: the answer of a line that succeeded. `unread`: why its images cannot be read now.
    """
    response, error = None, None
    stored = StoredError.read(job.error) if job.error else None
    if unread:
        stored = StoredError.of(unread)
    if body is not None:
        response = {"status_code": 200, "request_id": job.id, "body": body}
    elif stored:
        detail = ErrorDetail(
            message=stored.message, type=stored.type, param=stored.param, code=stored.code
        )
        answer = ErrorResponse(error=detail).model_dump()
        response = {"status_code": stored.status, "request_id": job.id, "body": answer}
    else:
        code, message = ENDED_WITHOUT[job.state]
        error = {"code": code, "message": message}
    line = {
        "id": f"batch_req_{job.id.removeprefix('job_')}",
        "custom_id": job.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
