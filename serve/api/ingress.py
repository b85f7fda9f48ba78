"""The Ingress deployment: HTTP in, images out. Stateless; as many replicas as needed."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..dispatch.session import DispatchSession
from ..errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    RequestIdInUse,
    Unavailable,
)
from ..request import ImageResult
from ..results.disk import DiskStore
from ..settings import Application, Tuning
from .drawing import Drawing
from .http_errors import HANDLERS
from .openai_images import (
    Generation,
    ModelItem,
    ModelList,
    check_request_id,
    ignored_header,
    model_not_found,
    parse,
    response,
)
from .openapi import document

log = logging.getLogger("ray.serve")

READY_TIMEOUT_S = 2.0
SWEEP_S = 10.0
PLAYGROUND = Path(__file__).with_name("playground.html")


class Ingress:
    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self, application: dict[str, Any], dispatcher: Any, generators: Mapping[str, Any]
    ) -> None:
        settings = Application.model_validate(application)
        self._models = settings.models
        self._dispatcher = dispatcher
        self._session = DispatchSession(dispatcher)
        streams = {pool: handle.options(stream=True) for pool, handle in generators.items()}
        self._drawing = Drawing(settings.models, self._session, streams)
        self._in_flight: set[str] = set()  # request ids
        self._tuning: Tuning | None = None
        self._started = int(time.time())
        self._playground = PLAYGROUND.read_text(encoding="utf-8")
        self._openapi = document(version("octet"))
        self._store, self._sweeping = None, None
        if settings.data_folder is not None:
            self._store = DiskStore(Path(settings.data_folder))
            self._sweeping = asyncio.create_task(self._sweep(self._store))

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve with a `Tuning`, before the first request and when it changes."""
        self._tuning = Tuning.model_validate(user_config)

    @property
    def tuning(self) -> Tuning:
        if self._tuning is None:
            raise RuntimeError("the Ingress got no user_config")
        return self._tuning

    async def check_health(self) -> None:
        """Called by Ray Serve; an Ingress without its session would accept and never answer."""
        self._session.check()
        if self._sweeping and self._sweeping.done():
            raise RuntimeError("stored images are no longer swept")

    def __serve_build_asgi_app__(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/images/generations", self.generate, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model}", self.model),
                Route("/v1/files/{name}", self.file),
                Route("/openapi.json", self.openapi),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/", self.playground),
            ],
            exception_handlers=HANDLERS,
        )

    # -- routes -------------------------------------------------------------------------------

    async def generate(self, http: Request) -> Response:
        tuning = self.tuning
        request_id = http.headers.get("x-request-id", uuid.uuid4().hex)
        check_request_id(request_id)
        asked = parse(await self._body(http), tuning, request_id)
        store = self._store_for(asked)
        if tuning.draining:
            raise Unavailable("this server is shutting down")
        if request_id in self._in_flight:
            raise RequestIdInUse(f"x-request-id '{request_id}' is being served")
        self._in_flight.add(request_id)
        try:
            async with asyncio.timeout(asked.timeout_s):
                results = await self._draw_all(asked, request_id)
                links = await self._keep(store, asked, results, http) if store else []
        except TimeoutError:
            raise DeadlineExceeded(f"the images were not done in {asked.timeout_s:g} s") from None
        finally:
            self._in_flight.discard(request_id)
        body = await asyncio.to_thread(response, asked.requests, results, links)
        return Response(body, media_type="application/json", headers=ignored_header(asked.ignored))

    async def models(self, _: Request) -> Response:
        models = [ModelItem(id=name, created=self._started) for name in self.tuning.models]
        return JSONResponse(ModelList(data=models).model_dump())

    async def model(self, http: Request) -> Response:
        name = http.path_params["model"]
        if name not in self.tuning.models:
            raise model_not_found(name, self.tuning)
        return JSONResponse(ModelItem(id=name, created=self._started).model_dump())

    async def file(self, http: Request) -> Response:
        if self._store is None:
            raise NotFound("this server keeps no images")
        name, link = http.path_params["name"], http.query_params
        expires, signature = link.get("expires", ""), link.get("signature", "")
        path = await asyncio.to_thread(self._store.open, name, expires, signature, time.time())
        return FileResponse(
            path,
            media_type=f"image/{path.suffix.removeprefix('.')}",
            headers={"x-content-type-options": "nosniff", "cache-control": "private"},
        )

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(self._openapi)

    async def health(self, _: Request) -> Response:
        """This process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Every model has a replica that answers, and new images are taken."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                found = await self._dispatcher.pools.remote()
        except (TimeoutError, RayError, RayServeException):
            found = {}
        models = {
            model.id: {name: found.get(name) for name in map(model.pool_name, model.pools)}
            for model in self._models
        }
        served = all(any(p and p["replicas"] for p in pools.values()) for pools in models.values())
        status = "draining" if self.tuning.draining else "ready" if served else "starting"
        body = {"status": status, "models": models}
        return JSONResponse(body, 200 if status == "ready" else 503)

    async def playground(self, _: Request) -> Response:
        return HTMLResponse(self._playground)

    # -- one request --------------------------------------------------------------------------

    async def _draw_all(self, asked: Generation, request_id: str) -> list[ImageResult]:
        """The images of one call, side by side; the first error ends them all."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._drawing.draw(r, request_id)) for r in asked.requests
                ]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    def _store_for(self, asked: Generation) -> DiskStore | None:
        """Where to keep the images of a call that wants URLs."""
        if not asked.as_url:
            return None
        if self._store is None:
            raise InvalidRequest(
                "response_format 'url': this server keeps no images", param="response_format"
            )
        return self._store

    async def _keep(
        self, store: DiskStore, asked: Generation, results: list[ImageResult], http: Request
    ) -> list[str]:
        """Store the images; returns their URLs. Raises `StoreFailed`."""
        base = self.tuning.public_url or str(http.base_url).rstrip("/")
        expires = int(time.time()) + self.tuning.results.link_expires_s
        names = [
            await asyncio.to_thread(store.put, result.image, request.output_format)
            for request, result in zip(asked.requests, results, strict=True)
        ]
        return [base + store.link(name, expires) for name in names]

    async def _sweep(self, store: DiskStore) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            keep = self.tuning.results
            await asyncio.to_thread(
                store.sweep, time.time(), max_age_s=keep.max_age_s, max_bytes=keep.max_bytes
            )

    async def _body(self, http: Request) -> bytes:
        body, limit = bytearray(), self.tuning.max_body_bytes
        async for chunk in http.stream():
            body += chunk
            if len(body) > limit:
                raise BodyTooLarge(f"the body is larger than {limit} bytes")
        return bytes(body)
