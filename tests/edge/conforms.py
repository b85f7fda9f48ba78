"""Checks of answers against the OpenAPI document."""

from typing import Any

from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)


def bad_json_is_rejected(context: Any, response: Any, case: Any) -> Any:
    """Check that a body that violates its schema is refused, unless it is a form.

    A wrong value may leave no trace in a form, such as an empty list, which is no field at all.
    """
    if case.media_type == "multipart/form-data":
        return None
    return negative_data_rejection(context, response, case)


CONFORMS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    bad_json_is_rejected,
    unsupported_method,
]
