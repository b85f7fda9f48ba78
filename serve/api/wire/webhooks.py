"""The formats of webhook endpoints, which are those of OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import InvalidRequest, did_you_mean
from ...jobs.outbox import EVENTS
from ...jobs.webhook_rows import EndpointChange, WebhookEndpoint
from .request import explained

MOST_CHARS = 2000  # of a URL


class NewWebhookBody(BaseModel):
    """The body of `POST /v1/webhook_endpoints`; without `event_types` all events are sent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[str, Field(max_length=MOST_CHARS)]
    name: Annotated[str, Field(max_length=255)] = ""
    event_types: list[str] | None = None


class ChangedWebhookBody(BaseModel):
    """The body of `POST /v1/webhook_endpoints/ID`: what is to change."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[str, Field(max_length=MOST_CHARS)] | None = None
    name: Annotated[str, Field(max_length=255)] | None = None
    event_types: list[str] | None = None


class WebhookItem(BaseModel):
    """A webhook endpoint; `disabled`: why nothing is sent there any more."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    created_at: int
    disabled: str | None


class NewWebhookItem(WebhookItem):
    """An endpoint with a new secret, which is shown only this once."""

    signing_secret: str


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
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: Literal[True] = True


def parse_webhook(
    body: bytes, kind: type[NewWebhookBody | ChangedWebhookBody], *, without_tls: bool
) -> EndpointChange:
    """Parse the body of a new or changed endpoint.

    `without_tls`: whether http: URLs may be used. Raises `InvalidRequest` with the first wrong
    field.
    """
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise explained(error) from None
    if asked.url is not None:
        _check_url(asked.url, ("https", "http") if without_tls else ("https",))
    if asked.name and not asked.name.isprintable():
        raise InvalidRequest("name must be printable", param="name")
    for event in asked.event_types or ():
        if event not in EVENTS:
            raise InvalidRequest(
                f"event_types: '{event[:80]}' is no event: {did_you_mean(event, EVENTS)}",
                param="event_types",
            )
    types = asked.event_types
    events = None if types is None else " ".join(dict.fromkeys(types))
    return EndpointChange(asked.name, asked.url, events)


def _check_url(text: str, schemes: tuple[str, ...]) -> None:
    try:
        url = urlsplit(text)
        wrong = not url.hostname or url.username or url.port == 0 or not text.isascii()
    except ValueError:
        wrong = True
    if wrong or url.scheme not in schemes or any(c <= " " for c in text):
        raise InvalidRequest(
            f"url '{text[:80]}' must be {' or '.join(s + '://HOST/…' for s in schemes)}, without a "
            "user name",
            param="url",
        )


def webhook_item(endpoint: WebhookEndpoint) -> WebhookItem:
    return WebhookItem(
        id=endpoint.id,
        name=endpoint.name,
        url=endpoint.url,
        event_types=endpoint.events.split() or list(EVENTS),
        created_at=int(endpoint.created),
        disabled=endpoint.disabled,
    )


def new_webhook_item(endpoint: WebhookEndpoint) -> NewWebhookItem:
    return NewWebhookItem(**webhook_item(endpoint).model_dump(), signing_secret=endpoint.secret)
