"""The formats of webhook endpoints."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import InvalidRequest, did_you_mean
from ...jobs.outbox import EVENTS
from ...jobs.webhook_rows import WebhookEndpoint
from .request import explained

MOST_CHARS = 2000  # of a URL


class NewWebhookBody(BaseModel):
    """The body of `POST /v1/webhook_endpoints`; without `enabled_events` all are sent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[str, Field(max_length=MOST_CHARS)]
    enabled_events: list[str] | None = None


class WebhookItem(BaseModel):
    """Where events are sent; `disabled`: why nothing is sent there any more."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    url: str
    enabled_events: list[str]
    created_at: int
    disabled: str | None


class NewWebhookItem(WebhookItem):
    """An endpoint that was made just now; `secret` is shown only this once."""

    secret: str


class WebhookList(BaseModel):
    """The response to `GET /v1/webhook_endpoints`, newest first."""

    object: Literal["list"] = "list"
    data: list[WebhookItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedWebhook(BaseModel):
    """The response to `DELETE /v1/webhook_endpoints/ID`."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    deleted: Literal[True] = True


def parse_webhook(body: bytes, *, without_tls: bool) -> tuple[str, str]:
    """Parse the body of a new endpoint; return its URL, and its events separated by spaces.

    `without_tls`: whether http: URLs may be used. Raises `InvalidRequest` with the first wrong
    field.
    """
    try:
        asked = NewWebhookBody.model_validate_json(body)
    except ValidationError as error:
        raise explained(error) from None
    try:
        url = urlsplit(asked.url)
        wrong = not url.hostname or url.username or url.port == 0 or not asked.url.isascii()
    except ValueError:
        wrong = True
    schemes = ("https", "http") if without_tls else ("https",)
    if wrong or url.scheme not in schemes or any(c <= " " for c in asked.url):
        raise InvalidRequest(
            f"url '{asked.url[:80]}' must be {' or '.join(s + '://HOST/…' for s in schemes)}, "
            "without a user name",
            param="url",
        )
    for event in asked.enabled_events or ():
        if event not in EVENTS:
            raise InvalidRequest(
                f"enabled_events: '{event[:80]}' is no event: {did_you_mean(event, EVENTS)}",
                param="enabled_events",
            )
    return asked.url, " ".join(dict.fromkeys(asked.enabled_events or ()))


def webhook_item(endpoint: WebhookEndpoint) -> WebhookItem:
    return WebhookItem(
        id=endpoint.id,
        url=endpoint.url,
        enabled_events=endpoint.events.split() or list(EVENTS),
        created_at=int(endpoint.created),
        disabled=endpoint.disabled,
    )


def new_webhook_item(endpoint: WebhookEndpoint) -> NewWebhookItem:
    return NewWebhookItem(**webhook_item(endpoint).model_dump(), secret=endpoint.secret)
