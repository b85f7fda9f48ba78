"""The Ingress deployment: HTTP in, images out. Stateless; as many replicas as needed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..dispatch.grants import Pools
from ..dispatch.session import DispatchSession
from ..errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InvalidRequest,
    NonFiniteImage,
    OctetError,
    ReplicaLost,
    Unavailable,
)
from ..request import ImageRequest, ImageResult, Precision
from ..settings import Application
from .openai_images import error_body, parse, response

log = logging.getLogger("ray.serve")

ATTEMPTS = 3  # a request whose replica dies is tried twice more, then it counts as the cause
READY_TIMEOUT_S = 2.0
PLAYGROUND = Path(__file__).with_name("playground.html")


class Ingress:
    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self, application: dict[str, Any], dispatcher: Any, generators: Mapping[str, Any]
    ) -> None:
        self._settings = Application.model_validate(application)
        self._models = {model.id: model for model in self._settings.models}
        self._dispatcher = dispatcher
        self._session = DispatchSession(dispatcher)
        self._generators = {
            pool: handle.options(stream=True) for pool, handle in generators.items()
        }
        self._started = int(time.time())
        self._playground = PLAYGROUND.read_text(encoding="utf-8")

    def __serve_build_asgi_app__(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/images/generations", self.generate, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/", self.playground),
            ],
            exception_handlers={
                OctetError: _octet_error,
                HTTPException: _http_error,
                Exception: _unexpected_error,
            },
        )

    # -- routes -------------------------------------------------------------------------------

    async def generate(self, http: Request) -> Response:
        requests = parse(await self._body(http), self._models)
        tasks: list[asyncio.Task[ImageResult]] = []
        try:
            async with (
                asyncio.timeout(self._settings.request_timeout_s),
                asyncio.TaskGroup() as group,
            ):
                tasks = [group.create_task(self._draw(request)) for request in requests]
        except TimeoutError:
            limit = self._settings.request_timeout_s
            raise DeadlineExceeded(f"the request was not done within {limit:g} s") from None
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        results = [task.result() for task in tasks]
        body = await asyncio.to_thread(response, requests, results)
        return Response(body, media_type="application/json")

    async def models(self, _: Request) -> Response:
        owner = {"object": "model", "created": self._started, "owned_by": "octet"}
        data = [{"id": name, **owner} for name in self._models]
        return JSONResponse({"object": "list", "data": data})

    async def health(self, _: Request) -> Response:
        """This process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Every model has a replica that answers."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                alive = await self._dispatcher.replicas.remote()
        except (TimeoutError, RayError, RayServeException):
            alive = {}
        models = {
            model.id: {
                model.pool_name(pool): alive.get(model.pool_name(pool), 0) for pool in model.pools
            }
            for model in self._models.values()
        }
        ready = all(any(pools.values()) for pools in models.values())
        status = "ready" if ready else "starting"
        return JSONResponse({"status": status, "replicas": models}, 200 if ready else 503)

    async def playground(self, _: Request) -> Response:
        return HTMLResponse(self._playground)

    # -- one image ----------------------------------------------------------------------------

    async def _draw(self, request: ImageRequest) -> ImageResult:
        """One image, from the queue to its bytes, on a replica that survives it."""
        began, pools = time.monotonic(), self._pools(request)
        failure: OctetError = ReplicaLost(f"the replica was lost in each of {ATTEMPTS} attempts")
        for attempt in range(1, ATTEMPTS + 1):
            async with self._session.slot(pools) as pool:
                queue_s = time.monotonic() - began
                stream = self._generators[pool].generate.remote(request)
                try:
                    result: ImageResult
                    async for result in stream:
                        return replace(result, timings=replace(result.timings, queue_s=queue_s))
                except asyncio.CancelledError:
                    stream.cancel()  # else the replica draws on in a slot that counts as free
                    raise
                except RayActorError:
                    log.warning("attempt %d of %s lost its replica", attempt, request.id)
                except RayServeException:
                    raise Unavailable(f"{pool} cannot be reached") from None
                except RayTaskError as error:
                    if not isinstance(error.cause, OctetError):
                        raise
                    failure, again = error.cause, self._sixteen_bit(request)
                    if not isinstance(failure, NonFiniteImage) or again in ((), pools):
                        raise failure from None
                    log.warning("%s: %s; trying in 16 bit", request.id, failure)
                    pools = again
        raise failure

    async def check_health(self) -> None:
        """Called by Ray Serve; an Ingress without its session would accept and never answer."""
        self._session.check()

    def _pools(self, request: ImageRequest) -> Pools:
        """The pools a request may run in, preferred first. Raises `InvalidRequest` if none."""
        model = self._models[request.model]
        pools = tuple(
            model.pool_name(pool)
            for pool in model.pools
            if request.precision in (Precision.AUTO, pool.precision)
        )
        if not pools:
            there = ", ".join(pool.precision for pool in model.pools)
            raise InvalidRequest(
                f"precision '{request.precision}': {model.id} is served in {there}",
                param="precision",
            )
        return pools

    def _sixteen_bit(self, request: ImageRequest) -> Pools:
        model = self._models[request.model]
        return tuple(model.pool_name(p) for p in model.pools if p.precision == Precision.FP16.value)

    async def _body(self, http: Request) -> bytes:
        body, limit = bytearray(), self._settings.max_body_bytes
        async for chunk in http.stream():
            body += chunk
            if len(body) > limit:
                raise BodyTooLarge(f"the body is larger than {limit} bytes")
        return bytes(body)


# Starlette's handlers are typed for any exception; each is registered for its own.


async def _octet_error(_: Request, error: Any) -> Response:
    headers = {"x-should-retry": str(error.retryable).lower()}
    return JSONResponse(error_body(error), error.status, headers)


async def _http_error(http: Request, error: Any) -> Response:
    message = f"{http.method} {http.url.path}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, error.headers)


async def _unexpected_error(_: Request, error: Exception) -> Response:
    log.error("unexpected error", exc_info=error)
    unexpected = OctetError("something went wrong here; it is in the server's log")
    return await _octet_error(_, unexpected)
