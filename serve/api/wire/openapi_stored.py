"""The part of the OpenAPI document about jobs, files, batches and webhooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from ...errors import (
    BodyTimeout,
    BodyTooLarge,
    Conflict,
    IdempotencyKeyInUse,
    InvalidRequest,
    NotFound,
    OctetError,
    OwnQueueFull,
    QuotaExceeded,
    RateLimited,
    Unavailable,
    tree,
)
from .batches import BatchItem, BatchList, DeletedFile, FileItem, FileList, NewBatchBody
from .jobs import JobItem, JobList, NewJobBody
from .openapi_parts import (
    answer_of,
    error_answers,
    json_content,
    parameter,
    request_id_header,
    whole_number,
)
from .pages import DEFAULT, MOST
from .webhooks import (
    ChangedWebhookBody,
    DeletedWebhook,
    NewWebhookBody,
    NewWebhookItem,
    WebhookItem,
    WebhookList,
)

BODIES: tuple[type[BaseModel], ...] = (
    *(NewJobBody, NewBatchBody, NewWebhookBody, ChangedWebhookBody),
)
ANSWERS: tuple[type[BaseModel], ...] = (
    *(JobItem, JobList, FileItem, FileList, DeletedFile, BatchItem, BatchList),
    *(WebhookItem, NewWebhookItem, WebhookList, DeletedWebhook),
)
ACCEPTANCE = tuple(error for error in tree() if error.status in (400, 404, 408, 409, 413, 429, 503))
# POST requests that are done again if they are sent again.
WITHOUT_KEY = (
    *("/v1/files", "/v1/batches/{id}/cancel", "/v1/webhook_endpoints"),
    *("/v1/webhook_endpoints/{id}", "/v1/webhook_endpoints/{id}/rotate_secret"),
)
ID = parameter("id", "path")
READING = NotFound, Unavailable


def stored_schemas() -> Iterator[tuple[type[BaseModel], Literal["validation", "serialization"]]]:
    """The classes of all bodies and answers."""
    for body in BODIES:
        yield body, "validation"
    for answer in ANSWERS:
        yield answer, "serialization"


def prefer_header() -> dict[str, Any]:
    return {
        "name": "prefer",
        "in": "header",
        "required": False,
        "description": "respond-async: answer 202 with a job at once.",
        "schema": {"type": "string"},
    }


def accepted() -> dict[str, Any]:
    return answer_of("The job", "JobItem", "location", "retry-after", "preference-applied")


def stored_paths() -> dict[str, Any]:
    """The paths of jobs, files, batches and webhooks."""
    jobs, files, batches, hooks = (
        f"/v1/{name}" for name in ("jobs", "files", "batches", "webhook_endpoints")
    )
    events = {
        "description": "Its changes until it has ended, as events",
        "content": {"text/event-stream": {"schema": {"type": "object"}}},
    }
    content = {"description": "The file", "content": {"application/jsonl": {"schema": {}}}}
    only_status = [_text("status"), _text("batch_id")]
    last_id = {**_text("last-event-id"), "in": "header"}
    return {
        jobs: {
            "get": _operation(
                "listJobs", "List jobs, the newest first", "JobList", *_page(only_status)
            ),
            "post": {
                "operationId": "createJob",
                "summary": "Have a request done later",
                "parameters": [request_id_header()],
                "requestBody": {"required": True, **json_content("NewJobBody")},
                "responses": {"202": accepted(), **error_answers(*ACCEPTANCE)},
            },
        },
        jobs + "/{id}": {
            "get": _operation("readJob", "Read a job", "JobItem", ID),
            "delete": _operation("cancelJob", "Cancel a job", "JobItem", ID, errors=(Conflict,)),
        },
        jobs + "/{id}/events": {
            "get": {
                "operationId": "watchJob",
                "summary": "Watch a job",
                "parameters": [ID, last_id],
                "responses": {
                    "200": events,
                    "204": {"description": "The client has the last event"},
                    **error_answers(*READING),
                },
            }
        },
        files: {
            "get": _operation(
                "listFiles",
                "List files, the newest first",
                "FileList",
                *_page([_text("purpose"), _text("order")], 10_000),
            ),
            "post": {
                "operationId": "createFile",
                "summary": "Upload the file of a batch",
                "parameters": [],
                "requestBody": {"required": True, "content": {"multipart/form-data": _form()}},
                "responses": {
                    "200": answer_of("The file", "FileItem"),
                    **error_answers(
                        *(InvalidRequest, BodyTimeout, BodyTooLarge, RateLimited, Unavailable)
                    ),
                },
            },
        },
        files + "/{id}": {
            "get": _operation("readFile", "Read what a file is", "FileItem", ID),
            "delete": _operation(
                "deleteFile", "Delete a file", "DeletedFile", ID, errors=(Conflict,)
            ),
        },
        files + "/{id}/content": {
            "get": {
                "operationId": "readFileContent",
                "summary": "Read a file",
                "parameters": [ID],
                "responses": {"200": content, **error_answers(*READING)},
            }
        },
        batches: {
            "get": _operation(
                "listBatches", "List batches, the newest first", "BatchList", *_page()
            ),
            "post": _operation(
                "createBatch",
                "Begin a batch",
                "BatchItem",
                body="NewBatchBody",
                errors=(
                    *(BodyTimeout, BodyTooLarge, IdempotencyKeyInUse),
                    *(RateLimited, OwnQueueFull, QuotaExceeded),
                ),
            ),
        },
        batches + "/{id}": {"get": _operation("readBatch", "Read a batch", "BatchItem", ID)},
        batches + "/{id}/cancel": {
            "post": _operation("cancelBatch", "Cancel a batch", "BatchItem", ID, errors=(Conflict,))
        },
        hooks: {
            "get": _operation(
                "listWebhookEndpoints", "List webhook endpoints", "WebhookList", *_page()
            ),
            "post": _operation(
                "createWebhookEndpoint",
                "Have events sent to a URL",
                "NewWebhookItem",
                body="NewWebhookBody",
                status="201",
                errors=(BodyTimeout, BodyTooLarge, Conflict, RateLimited),
            ),
        },
        hooks + "/{id}": {
            "get": _operation("readWebhookEndpoint", "Read an endpoint", "WebhookItem", ID),
            "post": _operation(
                "changeWebhookEndpoint",
                "Change an endpoint",
                "WebhookItem",
                ID,
                body="ChangedWebhookBody",
                errors=(BodyTimeout, BodyTooLarge, RateLimited),
            ),
            "delete": _operation(
                "deleteWebhookEndpoint", "Delete an endpoint", "DeletedWebhook", ID
            ),
        },
        hooks + "/{id}/rotate_secret": {
            "post": _operation("rotateWebhookSecret", "Get a new secret", "NewWebhookItem", ID)
        },
    }


def _operation(
    operation: str,
    summary: str,
    answer: str,
    *parameters: dict[str, Any],
    body: str = "",
    status: str = "200",
    errors: tuple[type[OctetError], ...] = (),
) -> dict[str, Any]:
    """Describe an operation; `answer`, `body`: the names of their schemas."""
    found: dict[str, Any] = {
        "operationId": operation,
        "summary": summary,
        "parameters": list(parameters),
        "responses": {
            status: answer_of(summary, answer),
            **error_answers(InvalidRequest, *READING, *errors),
        },
    }
    if body:
        found["requestBody"] = {"required": True, **json_content(body)}
    return found


def _page(more: list[dict[str, Any]] | None = None, most: int = MOST) -> list[dict[str, Any]]:
    """The parameters of a list that is read in pages."""
    limit = whole_number("limit", "Most entries of the answer", DEFAULT, 1, most)
    return [_text("after"), limit, *(more or [])]


def _text(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}


def _form() -> dict[str, Any]:
    properties: dict[str, Any] = {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["batch"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer"},
    }
    return {"schema": {"type": "object", "required": ["file", "purpose"], "properties": properties}}
