"""The OpenAPI document of all routes, made from the classes of the wire formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ...errors import (
    Conflict,
    IdempotencyKeyInUse,
    IdempotencyKeyReused,
    InvalidRequest,
    KeyInvalid,
    LinkInvalid,
    ModelNotFound,
    NotFound,
    StoreFailed,
    Unavailable,
    tree,
)
from ...tenants.keys import SCOPES
from .admin import (
    DEFAULT,
    LAST_ID,
    MOST,
    AuditList,
    DeletedTenant,
    DifferenceList,
    KeyList,
    NewKeyItem,
    RevokedKey,
    TenantItem,
    TenantList,
)
from .edit import EditFields, ImageEdit
from .openapi_parts import (
    answer_of,
    error_answers,
    idempotency_key_header,
    json_content,
    parameter,
    reference,
    request_id_header,
    whole_number,
)
from .openapi_stored import WITHOUT_KEY, accepted, prefer_header, stored_paths, stored_schemas
from .paths import EDITS, GENERATIONS
from .request import ImageGeneration
from .response import (
    CancelledRequest,
    CompletedEvent,
    ErrorEvent,
    ErrorResponse,
    ImagesResponse,
    LiftedQuarantine,
    ModelItem,
    ModelList,
    NodeCordon,
    PartialImageEvent,
    ProgressEvent,
    RequestStatus,
    UsageList,
)

IMAGE_ERRORS = tuple(
    error
    for error in tree()
    if error not in (KeyInvalid, LinkInvalid, NotFound, Conflict) and error.status != 405
)
ADMIN: tuple[type[BaseModel], ...] = (
    *(TenantItem, TenantList, DeletedTenant, NewKeyItem, KeyList, RevokedKey, AuditList),
    DifferenceList,
)
MANAGED_BY = {"enum": ["api", "file"], "default": "file"}
LIMITS = tuple(
    f"x-ratelimit-{name}-{of}"
    for of in ("requests", "work", "budget")
    for name in ("limit", "remaining", "reset")
)
EVENTS: dict[str, type[BaseModel]] = {
    "partial_image": PartialImageEvent,
    "progress": ProgressEvent,
    "completed": CompletedEvent,
}


def document(
    version: str, needs_key: Callable[[str], bool], *, takes_jobs: bool = True
) -> dict[str, Any]:
    """The OpenAPI 3.1 document as plain data.

    `needs_key`: whether a path needs an API key. `takes_jobs`: whether the server takes jobs.
    """
    _, schemas = models_json_schema(
        [
            (ImageGeneration, "validation"),
            (ImageEdit, "validation"),
            (EditFields, "validation"),
            (ImagesResponse, "serialization"),
            (ModelItem, "serialization"),
            (ModelList, "serialization"),
            (ErrorResponse, "serialization"),
            (CancelledRequest, "serialization"),
            (RequestStatus, "serialization"),
            (LiftedQuarantine, "serialization"),
            (NodeCordon, "serialization"),
            (UsageList, "serialization"),
            *((item, "serialization") for item in ADMIN),
            (ErrorEvent, "serialization"),
            *((event, "serialization") for event in EVENTS.values()),
            *(stored_schemas() if takes_jobs else ()),
        ],
        ref_template="#/components/schemas/{model}",
    )
    paths, defined = _paths(), schemas["$defs"]
    if takes_jobs:
        paths |= stored_paths()
        for path in (GENERATIONS, EDITS):
            paths[path]["post"]["parameters"].append(prefer_header())
            paths[path]["post"]["responses"]["202"] = accepted()
    for path, methods in paths.items():
        if (post := methods.get("post")) and path not in WITHOUT_KEY:
            post["parameters"].append(idempotency_key_header())
            post["responses"] |= error_answers(IdempotencyKeyReused)
        if needs_key(path):
            for operation in methods.values():
                operation["security"] = [{"key": []}]
                operation["responses"] |= error_answers(KeyInvalid)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Octet",
            "version": version,
            "description": "OpenAI's Images API on Stable Diffusion 3.5.",
        },
        "paths": paths,
        "components": {
            "schemas": {"ImageEditForm": _form(defined.pop("EditFields")), **defined},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths() -> dict[str, Any]:
    return {
        GENERATIONS: {
            "post": {
                "operationId": "createImage",
                "summary": "Generate images",
                "parameters": [request_id_header(), _cache_control()],
                "requestBody": {"required": True, **json_content("ImageGeneration")},
                "responses": {"200": _images("image_generation"), **error_answers(*IMAGE_ERRORS)},
            }
        },
        EDITS: {
            "post": {
                "operationId": "createImageEdit",
                "summary": "Edit an image",
                "parameters": [request_id_header(), _cache_control()],
                "requestBody": {
                    "required": True,
                    "content": {
                        **json_content("ImageEdit")["content"],
                        "multipart/form-data": {"schema": reference("ImageEditForm")},
                    },
                },
                "responses": {"200": _images("image_edit"), **error_answers(*IMAGE_ERRORS)},
            }
        },
        "/v1/requests/{id}": {
            "get": {
                "operationId": "readRequest",
                "summary": "Read where an open request is, by its x-request-id",
                "parameters": [parameter("id", "path")],
                "responses": {
                    "200": answer_of("The request is open", "RequestStatus"),
                    **error_answers(InvalidRequest, NotFound, Unavailable),
                },
            },
            "delete": {
                "operationId": "cancelRequest",
                "summary": "Cancel a request by its x-request-id",
                "parameters": [parameter("id", "path")],
                "responses": {
                    "200": answer_of("The request is being cancelled", "CancelledRequest"),
                    **error_answers(InvalidRequest, NotFound, Unavailable),
                },
            },
        },
        "/v1/models": {
            "get": {
                "operationId": "listModels",
                "summary": "List the models that are served",
                "responses": {"200": answer_of("The models", "ModelList")},
            }
        },
        "/v1/models/{model}": {
            "get": {
                "operationId": "retrieveModel",
                "summary": "Read one model",
                "parameters": [parameter("model", "path")],
                "responses": {
                    "200": answer_of("The model", "ModelItem"),
                    **error_answers(ModelNotFound),
                },
            }
        },
        **{
            f"/v1/files/{folder}/{{name}}": {
                "get": {
                    "operationId": f"read{of}Image",
                    "summary": "Read an image that was answered as a URL",
                    "parameters": [
                        parameter("name", "path"),
                        parameter("expires", "query"),
                        parameter("signature", "query"),
                    ],
                    "responses": {
                        "200": {
                            "description": "The image file",
                            "content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")},
                        },
                        "307": {
                            "description": "A link to the image in its bucket, valid for a while"
                        },
                        **error_answers(LinkInvalid, NotFound, StoreFailed),
                    },
                }
            }
            for folder, of in (("t", ""), ("j", "Job"))
        },
        "/v1/state": {
            "get": {
                "operationId": "readState",
                "summary": "Read the state of pools, queue and tenants (operators only)",
                "responses": {
                    "200": {
                        "description": "The state",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    },
                    **error_answers(NotFound, Unavailable),
                },
            }
        },
        **_admin_paths(),
        "/v1/quarantine/{id}": {
            "delete": {
                "operationId": "liftQuarantine",
                "summary": "Let a request pass again that has killed replicas (operators only)",
                "parameters": [parameter("id", "path")],
                "responses": {
                    "200": answer_of("The request passes again", "LiftedQuarantine"),
                    **error_answers(NotFound),
                },
            }
        },
        "/v1/nodes/{id}/cordon": {
            method: {
                "operationId": f"{name}Node",
                "summary": f"{text} (operators only)",
                "parameters": [parameter("id", "path")],
                "responses": {
                    "200": answer_of("What holds now", "NodeCordon"),
                    **error_answers(NotFound, Unavailable),
                },
            }
            for method, name, text in (
                ("put", "cordon", "Give a node no new work"),
                ("delete", "uncordon", "Let a node get work again"),
            )
        },
        "/health": {"get": _status("health", {200: "This process answers"})},
        "/ready": {
            "get": _status(
                "ready",
                {
                    200: "Every model has a replica; `degraded`: a store or a file does not work",
                    503: "A model has no replica yet, or the server is shutting down",
                },
            )
        },
    }


def _admin_paths() -> dict[str, Any]:
    """The paths of tenants, keys, audit and usage."""
    tenants, keys = "/admin/v1/tenants", "/admin/v1/keys"
    about, overlap = {"type": "object"}, {"type": "number", "default": 86400}
    new_tenant = {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}}
    new_key = {
        "type": "object",
        "required": ["tenant"],
        "properties": {
            "tenant": {"type": "string"},
            "scopes": {"type": "array", "items": {"enum": list(SCOPES)}},
            "expires_at": {"type": ["string", "null"], "format": "date-time"},
        },
    }
    files = {
        "type": "object",
        "required": ["tenants"],
        "properties": {
            "tenants": about,
            "keys": about,
            "managed_by": MANAGED_BY,
            "dry_run": {"type": "boolean"},
        },
    }
    rotation = {"type": "object", "properties": {"overlap_s": overlap}}
    return {
        tenants: {
            "get": _admin("listTenants", "List tenants", "TenantList", page="id"),
            "post": _admin("createTenant", "Add a tenant", "TenantItem", body=new_tenant),
        },
        tenants + "/{id}": {
            "get": _admin("readTenant", "Read a tenant", "TenantItem", "id"),
            "patch": _admin("changeTenant", "Change limits", "TenantItem", "id", body=about),
            "delete": _admin("deleteTenant", "Delete a tenant", "DeletedTenant", "id"),
        },
        keys: {
            "get": _admin("listKeys", "List keys", "KeyList", page="id", of_tenant=True),
            "post": _admin("createKey", "Make a key", "NewKeyItem", body=new_key),
        },
        keys + "/{id}/rotate": {
            "post": _admin("rotateKey", "Replace a key", "NewKeyItem", "id", body=rotation)
        },
        keys + "/{id}": {"delete": _admin("revokeKey", "Revoke a key", "RevokedKey", "id")},
        "/admin/v1/apply": {
            "post": _admin("applyFiles", "Apply tenants' files", "DifferenceList", body=files)
        },
        "/admin/v1/audit": {
            "get": _admin("listAudit", "List changes", "AuditList", page="number", of_tenant=True)
        },
        "/admin/v1/usage": {
            "get": _admin(
                "listUsage", "List usage records", "UsageList", page="number", of_tenant=True
            )
        },
    }


def _admin(
    operation: str,
    summary: str,
    answer: str,
    *path: str,
    body: dict[str, Any] | None = None,
    page: Literal["id", "number"] | None = None,
    of_tenant: bool = False,
) -> dict[str, Any]:
    """Describe an operation of the admin API.

    `path`: the parameters in its path. `page`: the kind of ids by which a list is read in pages.
    `of_tenant`: whether the list has the parameter `tenant`.
    """
    parameters = [parameter(name, "path") for name in path]
    if page:
        number = whole_number("after", "Entries behind this id", 0, 0, LAST_ID)
        text = {**number, "schema": {"type": "string", "default": ""}}
        parameters += [number if page == "number" else text]
        parameters += [whole_number("limit", "Most entries of the answer", DEFAULT, 1, MOST)]
    if of_tenant:
        schema = {"type": "string"}
        parameters += [{"name": "tenant", "in": "query", "required": False, "schema": schema}]
    status = "201" if operation in ("createTenant", "createKey", "rotateKey") else "200"
    errors = (InvalidRequest, NotFound, Conflict, IdempotencyKeyInUse, Unavailable)
    found = {
        "operationId": operation,
        "summary": f"{summary} (operators only)",
        "parameters": parameters,
        "responses": {status: answer_of(summary, answer), **error_answers(*errors)},
    }
    if body:
        found["requestBody"] = {"content": {"application/json": {"schema": body}}}
    return found


def _form(fields: dict[str, Any]) -> dict[str, Any]:
    """The schema of the form of an edit: the schema of its fields, with its files."""
    file = {"type": "string", "format": "binary"}
    return {
        **fields,
        "title": "ImageEditForm",
        "description": "The form of POST /v1/images/edits.",
        "properties": {"image": file, "mask": file, **fields["properties"]},
        "required": ["image", *fields["required"]],
    }


def _images(kind: str) -> dict[str, Any]:
    """Describe the successful answer: images as JSON, or as events for a request with `stream`.

    For events the schema describes one event; the event's data has its own schema in it. `kind`:
    how the types of the events begin.
    """
    headers = "x-octet-cache", "x-octet-ignored", "x-octet-eta-s", *LIMITS
    answer = answer_of("The images, or events", "ImagesResponse", *headers)
    events = [_event(f"{kind}.{name}", event) for name, event in EVENTS.items()]
    schema = {"oneOf": [*events, _event("error", ErrorEvent)]}
    answer["content"]["text/event-stream"] = {"schema": schema}
    return answer


def _event(name: str, event: type[BaseModel]) -> dict[str, Any]:
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": reference(event.__name__),
    }
    return {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": {"const": name}, "data": data},
    }


def _cache_control() -> dict[str, Any]:
    return {
        "name": "cache-control",
        "in": "header",
        "required": False,
        "description": "no-cache: generate the images anew, and keep them out of the cache.",
        "schema": {"type": "string"},
    }


def _status(operation: str, meanings: dict[int, str]) -> dict[str, Any]:
    """Describe a path whose JSON answer has the field `status`.

    `operation`: its operationId. `meanings`: the meaning of each HTTP status.
    """
    schema = {"type": "object", "required": ["status"], "properties": {"status": {}}}
    content = {"application/json": {"schema": schema}}
    responses = {str(s): {"description": m, "content": content} for s, m in meanings.items()}
    return {"operationId": operation, "summary": meanings[200], "responses": responses}
