"""The Ingress deployment: HTTP in, images out. Stateless, so it may have many replicas."""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from ..dispatch.client.attempts import Attempts
from ..dispatch.client.live_models import LiveModels
from ..dispatch.client.session import DispatchSession
from ..dispatch.protocol import CallQuery, CallState, PoolStatus
from ..errors import (
    InvalidRequest,
    KeyInvalid,
    NotFound,
    OctetError,
    Unavailable,
)
from ..models.model_files import Units
from ..models.reference_work import relative_costs
from ..results.store import StoreFault
from ..settings.application import FrontSettings, Settings
from ..settings.models import Model
from ..tenants.keys import TenantAccess
from .admin_routes import AdminRoutes
from .authentication import OPEN_FOLDERS, Authentication, is_open
from .canary import Canary
from .cors import Cors
from .edit_uploads import EditUploads, HeldPicture
from .generations import GenerationHandler
from .idempotency import Idempotency
from .image_urls import ImageUrls
from .ingress_metrics import IngressMetrics
from .job_requests import wants_job
from .operator_routes import OperatorRoutes
from .request_log import RefusalLog
from .request_reader import ReadRequest, RequestReader
from .result_reuse import ResultReuse
from .tenant_gate import TenantGate
from .timing import INGRESS_TIMING, IngressTiming
from .wire.http_errors import HANDLERS, unknown_path
from .wire.openapi import document
from .wire.paths import EDITS, GENERATIONS, VARIATIONS
from .wire.request import check_request_id, model_not_found
from .wire.response import (
    CancelledRequest,
    ModelItem,
    ModelList,
    RequestStatus,
    model_item,
)

if TYPE_CHECKING:
    from .stored_routes import StoredRoutes

log = logging.getLogger("ray.serve")

PLAYGROUND = Path(__file__).with_name("playground.html")
FAVICON = Path(__file__).with_name("favicon.svg")


class Ingress:
    """The HTTP routes, and what one Ingress replica needs to serve them."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self,
        front: dict[str, Any],
        dispatcher: Any,
        pool_handle: Callable[[str], Any],
        units: Units,
        timing: IngressTiming = INGRESS_TIMING,
    ) -> None:
        """`front`: the fields of `FrontSettings`. `dispatcher`: the handle of the Dispatcher.

        `pool_handle`: returns the handle of a pool's Generators. `units`: returns the reference
        work of each model. The models come with `reconfigure`.
        """
        self._timing = timing
        settings = FrontSettings.model_validate(front)
        self._auth, self._open_to_all = settings.auth, settings.auth != "keys"
        self._gate, self._refusal_log = TenantGate(), RefusalLog()
        self._dispatcher = dispatcher
        self._session = DispatchSession(dispatcher, timing.dispatch)
        self._metrics = metrics = IngressMetrics()
        self._attempts = Attempts(pool_handle, metrics, timing.dispatch)
        self._models = LiveModels(self._attempts, units)
        self._awaited: set[str] = set()  # models without which this server is not ready
        self._started = int(time.time())
        self._playground = PLAYGROUND.read_text(encoding="utf-8")
        self._favicon = FAVICON.read_bytes()
        self._openapi = document(
            version("octet-serve"), self._needs_key, takes_jobs=settings.runs_jobs
        )
        self._urls = ImageUrls(
            settings, lambda: self.live, metrics, timing.sweep_s, self._report_store_fault
        )
        self.reuse = ResultReuse(settings, lambda: self.live, self._urls, metrics)
        self._uploads = EditUploads(lambda: self.live.edits.max_held_bytes, metrics)
        self._operators = OperatorRoutes(
            self._session,
            dispatcher,
            timing,
            self._auth,
            self._access,
            self._authenticate_again,
            lambda: self.live.max_body_bytes,
        )
        self._reader = RequestReader(
            self._gate,
            self._uploads,
            self._access,
            self._allowed,
            self._authenticate_again,
            lambda: self.live,
            timing,
        )
        self._stored = await self._open_stored(settings) if settings.runs_jobs else None
        self._idempotency = Idempotency(
            self._session, dispatcher, timing, self._refused, self._replayed
        )
        self._admin = AdminRoutes(
            dispatcher,
            self._idempotency,
            timing,
            self._operators.check_admin,
            self._authenticate_again,
            lambda: self.live.max_body_bytes,
        )
        self._canary = Canary(self._session, self._attempts, lambda: self.live, metrics)
        self._generations = GenerationHandler(
            self._session,
            self._attempts,
            self._urls,
            self.reuse,
            metrics,
            timing.keep_alive_s,
            self._canary.offer,
        )

    async def _open_stored(self, settings: FrontSettings) -> StoredRoutes:
        """Make the routes of jobs, batches and webhooks."""
        # SQLAlchemy takes half a second to import, and other requests need it not.
        routes = await asyncio.to_thread(importlib.import_module, "serve.api.stored_routes")
        found: StoredRoutes = routes.StoredRoutes(
            settings,
            self._gate,
            self._access,
            self._authenticate_again,
            lambda: self.live,
            self._session,
            self._attempts,
            self._urls,
            self._metrics,
            self._timing,
        )
        return found

    @property
    def _stored_routes(self) -> list[Route]:
        if self._stored is None:
            return []
        return [
            Route("/v1/jobs", self.create_job, methods=["POST"]),
            *self._stored.routes,
        ]

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply the models and the live settings of `user_config`, which are all settings.

        Ray Serve calls this before the first request and whenever the settings change.
        """
        settings = Settings.model_validate(user_config)
        names = {model.id for model in settings.models}
        # A model that comes later does not make a server unready which serves the others.
        self._awaited = self._awaited & names if self._models.begun else names
        await self.reuse.set_models(settings)
        await self._models.set(settings)

    @property
    def live(self) -> Settings:
        """The present settings."""
        return self._models.settings

    async def check_health(self) -> None:
        """Raise `RuntimeError` if a background task has ended; called by Ray Serve.

        These are the tasks of the session with the Dispatcher and of the stored images. This is
        also the time to look for weights that were not there.
        """
        self._session.check()
        self._urls.check()
        self._metrics.held(self._uploads.held)
        await self._models.look_again()

    def __serve_build_asgi_app__(self) -> Starlette:
        app = Starlette(
            routes=[
                Route(GENERATIONS, self.generate, methods=["POST"]),
                Route(EDITS, self.edit, methods=["POST"]),
                Route(VARIATIONS, self.vary, methods=["POST"]),
                Route("/v1/requests/{id}", self.cancel, methods=["DELETE"]),
                Route("/v1/requests/{id}", self.request_status),
                Route("/v1/models", self.models),
                Route("/v1/models/{model}", self.model),
                *(Route(folder + "{name:path}", self.image) for folder in OPEN_FOLDERS),
                *self._stored_routes,
                Route("/openapi.json", self.openapi),
                *self._operators.routes,
                *self._admin.routes,
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/", self.playground),
                Route("/favicon.ico", self.favicon),
            ],
            exception_handlers=HANDLERS,
            middleware=[
                Middleware(Cors, origins=lambda: self.live.http.allowed_origins),
                Middleware(
                    Authentication,
                    mode=self._auth,
                    directory=lambda: self._session.tenants,
                    on_use=self._session.key_used,
                    on_refusal=self._refused,
                ),
            ],
        )
        app.router.redirect_slashes = False  # such a redirect would trust the Host header
        return app

    # -- routes -------------------------------------------------------------------------------

    async def generate(self, http: Request) -> Response:
        request_id = http.headers.get("x-request-id", uuid.uuid4().hex)
        as_job = self._takes_job(http)
        try:
            read = await self._reader.generation(http, request_id, as_job=as_job)
        except OctetError as error:
            self._refused(error, http.scope)
            raise
        return await self._answered_once(read, request_id, http, as_job=as_job)

    async def edit(self, http: Request) -> Response:
        request_id = http.headers.get("x-request-id", uuid.uuid4().hex)
        held, as_job = HeldPicture(self._uploads, http.scope["tenant"]), self._takes_job(http)
        with self._letting_go(held, http):
            read = await self._reader.edit(http, request_id, held, as_job=as_job)
        return await self._answered_once(read, request_id, http, held, as_job=as_job)

    async def create_job(self, http: Request) -> Response:
        request_id = http.headers.get("x-request-id", uuid.uuid4().hex)
        held = HeldPicture(self._uploads, http.scope["tenant"])
        with self._letting_go(held, http):
            read = await self._reader.job(http, request_id, held)
        return await self._answered_once(read, request_id, http, held, as_job=True)

    def _takes_job(self, http: Request) -> bool:
        """Return whether a request is to become a job, and can; a preference may be ignored."""
        return self._stored is not None and wants_job(http)

    @contextmanager
    def _letting_go(self, held: HeldPicture, http: Request) -> Iterator[None]:
        """Let go of a picture, and count the refusal, if reading its request fails."""
        try:
            yield
        except BaseException as error:
            held.release()
            if isinstance(error, OctetError):
                self._refused(error, http.scope)
            raise

    async def _answered_once(
        self,
        read: ReadRequest,
        request_id: str,
        http: Request,
        held: HeldPicture | None = None,
        *,
        as_job: bool,
    ) -> Response:
        """Answer a request for images, or with the answer that its Idempotency-Key got before.

        `as_job`: accept it as a job.
        """
        asked, parsed = read.asked, read.parsed
        if as_job:
            return await self._accepted(read, request_id, http, held)
        tenant: str = http.scope["tenant"]
        generate = partial(self._generations.answer, parsed, tenant, request_id, http, held)
        if asked is None:
            return await generate()
        try:
            if parsed.stream:
                error = InvalidRequest("stream: an idempotency-key allows none", param="stream")
                self._refused(error, http.scope)
                raise error
            return await self._idempotency.answer(asked, http, parsed.timeout_s, generate)
        finally:
            if held:
                held.release()

    async def _accepted(
        self, read: ReadRequest, request_id: str, http: Request, held: HeldPicture | None
    ) -> Response:
        """Accept a request as a job, and count and log it if it is refused."""
        if self._stored is None:
            raise unknown_path(http.method, http.url.path)
        try:
            return await self._stored.jobs.accept(
                read.parsed, read.endpoint, request_id, http, held, read.asked
            )
        except OctetError as error:
            self._refused(error, http.scope)
            raise

    async def vary(self, http: Request) -> Response:
        raise NotFound(f"{VARIATIONS} does not exist any more: use {EDITS}")

    async def cancel(self, http: Request) -> Response:
        """Answer `DELETE /v1/requests/ID`: cancel an open request at whichever Ingress has it.

        The request's images stop before their next step, and their slots are free then.
        """
        await self._ask_about(http, cancel=True)
        return JSONResponse(CancelledRequest(id=http.path_params["id"]).model_dump())

    async def request_status(self, http: Request) -> Response:
        """Answer `GET /v1/requests/ID`: where an open request is, at whichever Ingress."""
        state = await self._ask_about(http, cancel=False)
        status = RequestStatus(
            id=http.path_params["id"],
            status="queued" if state.queued and not state.running else "in_progress",
            queued=state.queued,
            running=state.running,
            queue_position=state.position,
            age_s=round(state.age_s, 3),
        )
        return JSONResponse(status.model_dump())

    async def _ask_about(self, http: Request, *, cancel: bool) -> CallState:
        """The state of the tenant's open request that the path names.

        Raises `NotFound` if there is none, and `Unavailable` if the Dispatcher does not know yet.
        """
        request_id = http.path_params["id"]
        check_request_id(request_id)
        query = CallQuery(http.scope["tenant"], request_id, cancel)
        answer = None
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.dispatcher_s):
                answer = await self._session.ask(query)
        if answer and answer.state:
            return answer.state
        if answer and answer.certain:
            raise NotFound(f"no open request has the id '{request_id}'")
        raise Unavailable("the dispatcher is restarting: try again")

    async def models(self, http: Request) -> Response:
        offer = self._allowed(http.scope["tenant"])
        models = [self._item(model) for model in offer.models]
        return JSONResponse(ModelList(data=models).model_dump())

    async def model(self, http: Request) -> Response:
        name, offer = http.path_params["model"], self._allowed(http.scope["tenant"])
        for model in offer.models:
            if model.id == name:
                return JSONResponse(self._item(model).model_dump())
        raise model_not_found(name, offer)

    def _item(self, model: Model) -> ModelItem:
        files = self._models.files
        prompts = files.example_prompts.get(model.id, [])
        costs = relative_costs(model, files.work[model.id])
        return model_item(model, self._started, prompts, costs)

    async def image(self, http: Request) -> Response:
        return await self._urls.read(http)

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(self._openapi)

    async def health(self, _: Request) -> Response:
        """Answer `GET /health`, which shows that this process runs."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Answer `GET /ready`: 200 if every model can be served and new requests are taken.

        A model that was added later counts from its first replica on.

        A model can be served if one of its pools has a replica. A pool that may be scaled to zero
        is enough without one, if a node could hold a replica. The answer costs no message to the
        Dispatcher: it comes from the status that the Dispatcher has sent last.

        The status is `degraded`, and the code still 200, while requests are answered but something
        else does not work, such as the upload of images to their bucket.
        """
        found, age_s = self._session.status()
        known = found.pools if found else {}
        models = {
            model.id: {name: known.get(name) for name in map(model.pool_name, model.pools)}
            for model in self.live.models
        }
        servable = {
            model
            for model, pools in models.items()
            if any(pool and _can_serve(pool) for pool in pools.values())
        }
        self._awaited |= servable
        served = self._awaited <= servable
        faults = found.faults if found else {}
        ready = "degraded" if faults else "ready"
        status = "draining" if found and found.draining else ready if served else "starting"
        details: dict[str, Any] = {}
        if self._open_to_all:
            details = {
                "age_s": round(age_s, 3) if found else None,
                "queued": found.queued if found else None,
                "faults": faults if self._auth == "none" else list(faults),
                "models": {
                    model: {name: pool and pool._asdict() for name, pool in pools.items()}
                    for model, pools in models.items()
                },
            }
        return JSONResponse({"status": status, **details}, 200 if status == ready else 503)

    def _report_store_fault(self, fault: StoreFault | None) -> None:
        part = f"image store of {socket.gethostname()}"
        self._session.set_fault(part, f"{fault.place}: {fault.message}" if fault else "")

    async def playground(self, _: Request) -> Response:
        return HTMLResponse(self._playground)

    async def favicon(self, _: Request) -> Response:
        return Response(self._favicon, media_type="image/svg+xml")

    # -- one request --------------------------------------------------------------------------

    def _allowed(self, tenant: str) -> Settings:
        """The settings with only the models that a tenant may use."""
        allowed = self._access(tenant).models
        if allowed is None:
            return self.live
        models = tuple(model for model in self.live.models if model.id in allowed)
        return self.live.model_copy(update={"models": models})

    def _refused(self, error: OctetError, scope: Scope) -> None:
        """Count and log a request that was refused before it was a request for images."""
        self._metrics.ended(scope["path"], "", error.code, error.status)
        request_id = Headers(scope=scope).get("x-request-id")
        self._refusal_log.refused(error, scope.get("tenant"), request_id)

    def _replayed(self, scope: Scope, status: int) -> None:
        """Count a request that got the answer which its Idempotency-Key had got before."""
        self._metrics.ended(scope["path"], "", "replayed", status)

    def _needs_key(self, path: str) -> bool:
        return not (self._open_to_all or is_open(path))

    def _access(self, tenant: str) -> TenantAccess:
        """Return the access of a tenant; a server that needs no keys gives everybody all access."""
        if self._open_to_all:
            return TenantAccess((), operator=True)
        found = self._session.tenants and self._session.tenants.get(tenant)
        return found or TenantAccess((), models=())

    def _authenticate_again(self, http: Request) -> None:
        """Check the request's API key again, after its body has arrived.

        Raises `KeyInvalid` if the key was revoked while the body was on its way.
        """
        directory = self._session.tenants
        if not (
            self._open_to_all or (directory and directory.owner(http.scope["key"], time.time()))
        ):
            raise KeyInvalid("the API key was revoked")


def _can_serve(pool: PoolStatus) -> bool:
    """Return whether the pool has a replica, or would get its first one on a request."""
    return bool(pool.replicas or (pool.placeable and not pool.least))
