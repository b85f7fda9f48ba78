"""The routes of webhook endpoints, as in OpenAI's API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import Conflict
from ..jobs.queries import page
from ..jobs.webhook_rows import (
    MOST_ENDPOINTS,
    EndpointChange,
    WebhookEndpoint,
    add_endpoint,
    change_endpoint,
    find_endpoint,
    new_secret,
    remove_endpoint,
)
from ..store.schema import WEBHOOKS
from .route_context import RouteContext, json_answer, list_answer
from .wire.pages import parse_page
from .wire.webhooks import (
    ChangedWebhookBody,
    DeletedWebhook,
    NewWebhookBody,
    WebhookList,
    new_webhook_item,
    parse_webhook,
    webhook_item,
)

PATH = "/v1/webhook_endpoints"


class WebhookRoutes:
    """Answers requests about webhook endpoints."""

    def __init__(self, context: RouteContext) -> None:
        self._context = context
        self.routes = [
            Route(PATH, self.create, methods=["POST"]),
            Route(PATH, self.list, methods=["GET"]),
            Route(PATH + "/{id}", self.read, methods=["GET"]),
            Route(PATH + "/{id}", self.change, methods=["POST"]),
            Route(PATH + "/{id}/rotate_secret", self.rotate, methods=["POST"]),
            Route(PATH + "/{id}", self.delete, methods=["DELETE"]),
        ]

    async def create(self, http: Request) -> Response:
        """Answer `POST /v1/webhook_endpoints`; only this answer has the secret."""
        given = await self._given(http, NewWebhookBody)
        tenant = http.scope["tenant"]
        made = await self._context.write(
            lambda connection, now: add_endpoint(connection, tenant, given, now)
        )
        if made is None:
            raise Conflict(f"you have {MOST_ENDPOINTS} endpoints already: delete one")
        return json_answer(new_webhook_item(made), 201)

    async def change(self, http: Request) -> Response:
        """Answer `POST /v1/webhook_endpoints/ID`: change it, and enable it again."""
        given = await self._given(http, ChangedWebhookBody)
        id, tenant = self._context.id(http), http.scope["tenant"]
        changed = await self._context.write(
            lambda connection, _: change_endpoint(connection, id, tenant, given)
        )
        if changed is None:
            raise self._context.not_found(http)
        return json_answer(webhook_item(changed))

    async def rotate(self, http: Request) -> Response:
        """Answer `POST /v1/webhook_endpoints/ID/rotate_secret` with the new secret."""
        id, tenant = self._context.id(http), http.scope["tenant"]
        changed = await self._context.write(
            lambda connection, _: new_secret(connection, id, tenant)
        )
        if changed is None:
            raise self._context.not_found(http)
        return json_answer(new_webhook_item(changed))

    async def _given(
        self, http: Request, kind: type[NewWebhookBody | ChangedWebhookBody]
    ) -> EndpointChange:
        body = await self._context.body(http)
        return parse_webhook(body, kind, without_tls=bool(self._context.live.jobs.webhook_networks))

    async def list(self, http: Request) -> Response:
        """Answer `GET /v1/webhook_endpoints`."""
        asked, tenant = parse_page(http.query_params), http.scope["tenant"]
        rows = await self._context.read(
            lambda connection: page(connection, WEBHOOKS, tenant, asked.after, asked.limit)
        )
        data = [webhook_item(WebhookEndpoint(*row)) for row in rows[: asked.limit]]
        return list_answer(WebhookList, data, has_more=len(rows) > asked.limit)

    async def read(self, http: Request) -> Response:
        """Answer `GET /v1/webhook_endpoints/ID`."""
        return json_answer(webhook_item(await self._endpoint(http)))

    async def delete(self, http: Request) -> Response:
        """Answer `DELETE /v1/webhook_endpoints/ID`; nothing more is sent there."""
        endpoint = await self._endpoint(http)
        await self._context.write(lambda connection, _: remove_endpoint(connection, endpoint.id))
        return json_answer(DeletedWebhook(id=endpoint.id))

    async def _endpoint(self, http: Request) -> WebhookEndpoint:
        id, tenant = self._context.id(http), http.scope["tenant"]
        found = await self._context.read(lambda connection: find_endpoint(connection, id, tenant))
        if found is None:
            raise self._context.not_found(http)
        return found
