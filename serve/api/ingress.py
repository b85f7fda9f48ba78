"""The Ingress deployment: HTTP in, images out. Stateless; as many replicas as needed."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from cluster.cost import CostCoefficients

from ..dispatch.client.session import DispatchSession
from ..errors import (
    BodyTimeout,
    BodyTooLarge,
    KeyInvalid,
    NotFound,
    OctetError,
    Unavailable,
)
from ..settings.application import ApplicationSettings, IngressSettings
from ..tenants.keys import TenantAccess, tenant_of
from .attempts import Attempts
from .authentication import Authentication
from .generations import GenerationHandler
from .image_urls import ImageUrls
from .ingress_metrics import IngressMetrics
from .result_reuse import ResultReuse
from .wire.http_errors import HANDLERS
from .wire.openapi import document
from .wire.request import check_request_id, model_not_found, parse
from .wire.response import CancelledRequest, ModelItem, ModelList

log = logging.getLogger("ray.serve")

ANSWER_S = 2.0  # of the Dispatcher
BODY_S = 30.0
PLAYGROUND = Path(__file__).with_name("playground.html")


class Ingress:
    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self,
        application: dict[str, Any],
        work: Mapping[str, Sequence[float]],
        dispatcher: Any,
        generators: Mapping[str, Any],
    ) -> None:
        settings = ApplicationSettings.model_validate(application)
        self._models = settings.models
        self._auth, self._open_to_all = settings.auth, settings.auth != "keys"
        self._dispatcher = dispatcher
        self._session = DispatchSession(dispatcher)
        streams = {pool: handle.options(stream=True) for pool, handle in generators.items()}
        units = {model: CostCoefficients(*unit) for model, unit in work.items()}
        self._metrics = metrics = IngressMetrics()
        drawing = Attempts(settings.models, units, streams, metrics)
        self._tuning: IngressSettings | None = None
        self._started = int(time.time())
        self._playground = PLAYGROUND.read_text(encoding="utf-8")
        self._openapi = document(version("octet-serve"), keys=not self._open_to_all)
        self._urls = ImageUrls(settings, lambda: self.tuning, metrics)
        repeats = ResultReuse(settings, lambda: self.tuning, self._urls, metrics)
        self._generations = GenerationHandler(self._session, drawing, self._urls, repeats, metrics)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve with a `IngressSettings`, before the first request and when it changes."""
        self._tuning = IngressSettings.model_validate(user_config)

    @property
    def tuning(self) -> IngressSettings:
        if self._tuning is None:
            raise RuntimeError("the Ingress got no user_config")
        return self._tuning

    async def check_health(self) -> None:
        """Called by Ray Serve; an Ingress without its session would accept and never answer."""
        self._session.check()
        self._urls.check()

    def __serve_build_asgi_app__(self) -> Starlette:
        app = Starlette(
            routes=[
                Route("/v1/images/generations", self.generate, methods=["POST"]),
                Route("/v1/requests/{id}", self.cancel, methods=["DELETE"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model}", self.model),
                Route("/v1/files/{name:path}", self.file),
                Route("/openapi.json", self.openapi),
                Route("/v1/state", self.state),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/", self.playground),
            ],
            exception_handlers=HANDLERS,
            middleware=[
                Middleware(
                    Authentication, mode=self._auth, directory=lambda: self._session.directory
                )
            ],
        )
        app.router.redirect_slashes = False  # such a redirect would trust the Host header
        return app

    # -- routes -------------------------------------------------------------------------------

    async def generate(self, http: Request) -> Response:
        tenant: str = http.scope["tenant"]
        request_id = http.headers.get("x-request-id", uuid.uuid4().hex)
        try:
            check_request_id(request_id)
            known = self._known(tenant)
            body = await self._body(http)
            self._authenticate_again(http)
            asked = parse(body, self._offer(tenant), request_id, known.timeout_s)
        except OctetError as error:
            self._metrics.ended("", error.code, error.status)
            raise
        return await self._generations.answer(asked, tenant, request_id, http)

    async def cancel(self, http: Request) -> Response:
        """End a call at whichever Ingress it is; its slots are free before their next step."""
        request_id = http.path_params["id"]
        check_request_id(request_id)
        try:
            async with asyncio.timeout(ANSWER_S):
                found = await self._dispatcher.cancel.remote(http.scope["tenant"], request_id)
        except (TimeoutError, RayError, RayServeException):
            found = None
        if found is None:
            raise Unavailable("the dispatcher is restarting: try again")
        if not found:
            raise NotFound(f"no request '{request_id}' waits or runs")
        return JSONResponse(CancelledRequest(id=request_id).model_dump())

    async def models(self, http: Request) -> Response:
        offer = self._offer(http.scope["tenant"])
        models = [ModelItem(id=name, created=self._started) for name in offer.models]
        return JSONResponse(ModelList(data=models).model_dump())

    async def model(self, http: Request) -> Response:
        name, offer = http.path_params["model"], self._offer(http.scope["tenant"])
        if name not in offer.models:
            raise model_not_found(name, offer)
        return JSONResponse(ModelItem(id=name, created=self._started).model_dump())

    async def file(self, http: Request) -> Response:
        return await self._urls.read(http)

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(self._openapi)

    async def state(self, http: Request) -> Response:
        """Pools, queue and tenants, for those who operate the server."""
        if not self._known(http.scope["tenant"]).operator:
            raise NotFound("GET /v1/state: Not Found")
        try:
            async with asyncio.timeout(ANSWER_S):
                return JSONResponse(await self._dispatcher.overview.remote())
        except (TimeoutError, RayError, RayServeException):
            raise Unavailable("the dispatcher is restarting: try again") from None

    async def health(self, _: Request) -> Response:
        """This process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Every model has a replica, or may have none and wakes; and new images are taken."""
        try:
            async with asyncio.timeout(ANSWER_S):
                found = await self._dispatcher.state.remote()
        except (TimeoutError, RayError, RayServeException):
            found = {"draining": False, "queued": None, "pools": {}}
        models = {
            model.id: {p: found["pools"].get(p) for p in map(model.pool_name, model.pools)}
            for model in self._models
        }
        served = all(
            any(
                p and (p["replicas"] or (p["placeable"] and not p["least"])) for p in pools.values()
            )
            for pools in models.values()
        )
        status = "draining" if found["draining"] else "ready" if served else "starting"
        details = {"queued": found["queued"], "models": models} if self._open_to_all else {}
        return JSONResponse({"status": status, **details}, 200 if status == "ready" else 503)

    async def playground(self, _: Request) -> Response:
        return HTMLResponse(self._playground)

    # -- one request --------------------------------------------------------------------------

    def _offer(self, tenant: str) -> IngressSettings:
        """What there is to ask for, as far as a tenant may."""
        allowed = self._known(tenant).models
        if allowed is None:
            return self.tuning
        models = {name: model for name, model in self.tuning.models.items() if name in allowed}
        return self.tuning.model_copy(update={"models": models})

    def _known(self, tenant: str) -> TenantAccess:
        """Of the one tenant of a server without authentication: that it may do everything."""
        if self._open_to_all:
            return TenantAccess((), operator=True)
        return (self._session.directory or {}).get(tenant, TenantAccess((), models=()))

    def _authenticate_again(self, http: Request) -> None:
        """A body may take its time. Raises `KeyInvalid` if the key has been revoked meanwhile."""
        if not self._open_to_all:
            key, directory = http.scope["key"], self._session.directory or {}
            if tenant_of(key, directory) != http.scope["tenant"]:
                raise KeyInvalid("the API key was revoked")

    async def _body(self, http: Request) -> bytes:
        body, limit = bytearray(), self.tuning.max_body_bytes
        too_large = BodyTooLarge(f"the body is larger than {limit} bytes")
        stated = http.headers.get("content-length", "")
        if stated.isdecimal() and len(stated) < 20 and int(stated) > limit:
            raise too_large
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive in {BODY_S:g} s") from None
        return bytes(body)
