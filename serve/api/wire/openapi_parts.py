"""Parts of the OpenAPI document, as plain data."""

from __future__ import annotations

from typing import Any

from ...errors import OctetError
from .request import REQUEST_ID


def reference(schema: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{schema}"}


def json_content(schema: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": reference(schema)}}}


def answer_of(description: str, schema: str, *headers: str) -> dict[str, Any]:
    named = {name: {"schema": {"type": "string"}} for name in ("x-request-id", *headers)}
    return {"description": description, "headers": named, **json_content(schema)}


def error_answers(*errors: type[OctetError]) -> dict[str, Any]:
    """Describe the responses for these errors, one for each HTTP status."""
    codes: dict[str, list[str]] = {}
    for error in errors:
        codes.setdefault(str(error.status), []).append(error.code)
    return {
        status: answer_of("error.code: " + ", ".join(found), "ErrorResponse", "x-should-retry")
        for status, found in sorted(codes.items())
    }


def parameter(name: str, place: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": True, "schema": {"type": "string"}}


def whole_number(
    name: str, description: str, default: int, least: int, most: int
) -> dict[str, Any]:
    limits = {"type": "integer", "default": default, "minimum": least, "maximum": most}
    return {"name": name, "in": "query", "description": description, "schema": limits}


def request_id_header() -> dict[str, Any]:
    schema = {"type": "string", "pattern": f"^{REQUEST_ID.pattern}$"}
    return {"name": "x-request-id", "in": "header", "required": False, "schema": schema}


def idempotency_key_header() -> dict[str, Any]:
    return {
        "name": "idempotency-key",
        "in": "header",
        "required": False,
        "description": "The same key and request get the same answer for 24 hours.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    }
