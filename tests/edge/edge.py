"""An Ingress and a Dispatcher behind real HTTP, with Generators that return plain colours."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from ray.exceptions import ActorDiedError
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.cost import CostCoefficients
from serve.api.early_body import EarlyBody
from serve.api.flood_guard import FloodGuard, FloodTiming
from serve.api.ingress import Ingress
from serve.api.job_requests import parse_images
from serve.api.proxy_guard import ProxyGuard
from serve.api.timing import INGRESS_TIMING, IngressTiming
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.protocol import Heartbeat, Lease, StoppedImage
from serve.edit_pixels import EditPixels
from serve.jobs.deployment import Jobs
from serve.jobs.timing import JobTiming
from serve.request import (
    SHADOW,
    Acknowledgement,
    ImageRequest,
    Progress,
    StreamOptions,
)
from serve.results.cache.redis import RedisCache
from serve.settings.application import CatalogueSettings, Settings
from serve.settings.serve_config import serve_config

from ..builders import image_result
from ..in_process import Handle, a_dispatcher
from ..ports import free_port
from ..wait import wait_for

# Quick, so that tests need not wait; a lease outlasts what a busy machine may hold up.
JOB_TIMING = JobTiming(
    lease_s=3.0, renew_s=0.5, poll_s=0.02, sweep_s=0.1, forget_s=0.2, pause_s=0.1, retry_s=0.1
)
LONG_HOLD = FloodTiming(hold_s=60.0)  # so that no test depends on the machine's speed
WORK = CostCoefficients(0.001, 0.0002, 0.0, 0.0, 0.0)  # seconds of an image and of a step


Units = Callable[[CatalogueSettings], dict[str, CostCoefficients]]


def units(settings: CatalogueSettings) -> dict[str, CostCoefficients]:
    """The reference work of each model."""
    return {model.id: WORK for model in settings.models}


def front(settings: Settings) -> dict[str, Any]:
    """The arguments with which Ray Serve starts an Ingress."""
    arguments: dict[str, Any] = serve_config(settings)["applications"][0]["args"]["front"]
    return arguments


class Painter:
    """A Generator that returns a plain colour, for an edit in the part that is repainted.

    The prompt "slow" takes half a second, "held" takes until the end of `holding`, "broken" fails,
    and "deadly" kills the replica. Every other image is done at once. A stopped image has had half
    of its steps. A shadow is done at once, or waits while `hold_shadows`; its colour differs from
    the image's if the prompt is "drifts".
    """

    def __init__(self) -> None:
        self.stopped: list[StoppedImage] = []
        self.begun = self.generated = self.cancelled = 0
        self.shadows = self.stopped_shadows = 0
        self.hold_shadows = False
        self.prompts: list[str] = []  # of the images, in the order in which they were generated
        self._held = False

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let images with the prompt "held" run until the block ends."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    async def generate(
        self,
        request: ImageRequest,
        lease: Lease,
        options: StreamOptions,
        alone: bool,
        edited: EditPixels | None = None,
    ) -> AsyncIterator[Any]:
        yield Acknowledgement.RECEIVED
        yield Acknowledgement.STARTED
        if request.id == SHADOW:
            await self._shadow()
            if request.prompt == "fails again":
                raise ZeroDivisionError
        self.begun += 1
        if options.progress:
            yield Progress(0, request.steps)
        if request.prompt == "broken":
            raise ZeroDivisionError
        if request.prompt == "deadly":
            raise ActorDiedError
        if request.prompt in ("slow", "held"):
            try:
                await asyncio.sleep(0.5 if request.prompt == "slow" else 0)
                while request.prompt == "held" and self._held:  # noqa: ASYNC110 - threads set it
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.cancelled += 1
                self.stopped.append(StoppedImage(lease, request.steps // 2, 0.0))
                raise
        self.generated += 1
        self.prompts.append(request.prompt)
        file = io.BytesIO()
        drift = 0x404040 * (request.id == SHADOW and request.prompt == "drifts")
        colour = f"#{(request.seed + drift) % 2**24:06x}"
        if edited:
            canvas = np.asarray(Image.new("RGB", request.canvas, colour))
            image = Image.fromarray(edited.finished(canvas))
        else:
            image = Image.new("RGB", (16, 16), colour)
        image.save(file, request.output_format)
        precision = "bf16" if lease.pool.endswith("fp16") else "fp8"
        yield image_result(
            file.getvalue(),
            seed=request.seed,
            precision=precision,
            emulated=True,
            text_tokens=77,
        )

    async def _shadow(self) -> None:
        self.shadows += 1
        try:
            while self.hold_shadows:  # noqa: ASYNC110 - threads set it
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.stopped_shadows += 1
            raise


class Edge:
    """Ingresses behind uvicorn, in a thread of their own; `port`, `url` and `ingress`: the first.

    `urls`: one for each Ingress. All have the same Dispatcher and the same Generators.
    """

    def __init__(
        self,
        settings: Settings,
        timing: IngressTiming,
        ingresses: int,
        units: Units,
        remote: Any = None,
        *,
        stored: bool = False,
        runners: int = 0,
    ) -> None:
        """`remote`: a Dispatcher in another process; None: it is in this one.

        `stored`: whether usage is kept in the database also without keys. `runners`: of jobs.
        """
        self._remote, self._stored = remote, stored or bool(runners)
        self._runners = runners
        self.jobs: list[Jobs] = []
        self.settings, self._timing, self._units = settings, timing, units
        self._ports = [free_port() for _ in range(ingresses)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self.port, self.url = self._ports[0], self.urls[0]
        self.painter, self.passed, self.up = Painter(), 0, False
        self._servers: list[uvicorn.Server] = []
        self.ingresses: list[Ingress] = []
        self.dispatcher: Dispatcher
        self.loop: asyncio.AbstractEventLoop
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        settings = self.settings
        pools = [m.pool_name(p) for m in settings.models for p in m.pools]
        keyed = settings.auth == "keys"
        self.dispatcher = dispatcher = self._remote or a_dispatcher(
            *pools,
            max_queued=100,
            database=settings.database if keyed or self._stored else None,
            tenants_folder=settings.tenants_folder,
            keyed=keyed,
        )
        await self._report(dispatcher, pools)
        heartbeat = asyncio.create_task(self._beat(dispatcher, pools))
        serving = []
        for port in self._ports:
            ingress = Ingress.__new__(Ingress)
            await ingress.__init__(  # type: ignore[misc]  # like Ray Serve
                front(settings),
                Handle(dispatcher),
                lambda _pool: Handle(self.painter),
                self._units,
                self._timing,
            )
            self.ingresses.append(ingress)
            app = EarlyBody(self._counted(ingress.__serve_build_asgi_app__()))
            config = uvicorn.Config(
                ProxyGuard(FloodGuard(app, LONG_HOLD)),
                port=port,
                log_level="error",
                ws="none",
                lifespan="on",
            )
            server = uvicorn.Server(config)
            self._servers.append(server)
            serving.append(asyncio.create_task(server.serve()))
            while not (server.started or serving[-1].done()):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)
        for _ in range(self._runners):
            await self.add_runner()
        await self._tune(self.settings)  # after the start, like Ray Serve
        self.up = all(server.started for server in self._servers)
        await asyncio.gather(*serving)
        for jobs in list(self.jobs):
            await self.end_runner(jobs)
        heartbeat.cancel()
        for ingress in self.ingresses:
            if ingress._stored:
                ingress._stored.database.close()
            if isinstance(ingress.reuse.cache, RedisCache):
                await ingress.reuse.cache.close()
        if self._remote is None and dispatcher.store:
            dispatcher.store.close()

    async def add_runner(self) -> Jobs:
        """Start another runner of jobs, in the edge's loop."""
        jobs = Jobs.__new__(Jobs)
        await jobs.__init__(  # type: ignore[misc]  # like Ray Serve
            front(self.settings),
            Handle(self.dispatcher),
            lambda _pool: Handle(self.painter),
            self._units,
            parse_images,
            JOB_TIMING,
            cluster=lambda: "here",
        )
        await jobs.reconfigure(self.settings.model_dump(mode="json", exclude_unset=True))
        self.jobs.append(jobs)
        return jobs

    async def end_runner(self, jobs: Jobs, *, killed: bool = False) -> None:
        """End a runner; `killed`: without a word, so that its leases have to end."""
        self.jobs.remove(jobs)
        if killed:
            for task in (*jobs._tasks, *jobs.runner._tasks.values(), *jobs._session._tasks):
                task.cancel()
        else:
            await jobs.close()

    def _counted(self, app: ASGIApp) -> ASGIApp:
        """Count the requests that reach the Ingress in `passed`."""

        async def counting(scope: Scope, receive: Receive, send: Send) -> None:
            self.passed += scope["type"] == "http"
            await app(scope, receive, send)

        return counting

    async def _beat(self, dispatcher: Any, pools: list[str]) -> None:
        while True:
            await self._report(dispatcher, pools)
            await asyncio.sleep(0.2)

    async def _report(self, dispatcher: Any, pools: list[str]) -> None:
        for pool in pools:
            stopped, self.painter.stopped = self.painter.stopped, []
            with suppress(ConnectionError, FileNotFoundError):  # a remote one may be dead
                await dispatcher.report_replica(Heartbeat(pool, "r", 4), [], stopped)

    def wait_until_open(self, *request_ids: str, tenant: str = "anonymous") -> None:
        """Wait until the Dispatcher has admitted all of these requests of a tenant."""
        find = self.dispatcher.admission.find
        wait_for(lambda: all(find(tenant, request_id) for request_id in request_ids))

    @property
    def ingress(self) -> Ingress:
        return self.ingresses[0]

    def tune(self, settings: Settings) -> None:
        """Give all Ingresses these settings; called from another thread."""
        asyncio.run_coroutine_threadsafe(self._tune(settings), self.loop).result()

    async def _tune(self, settings: Settings) -> None:
        live = settings.model_dump(mode="json", exclude_unset=True)
        if self._remote is None:
            self.dispatcher.apply_jobs(settings.models, settings.jobs)
        for ingress in self.ingresses:
            await ingress.reconfigure(live)
        for jobs in self.jobs:
            await jobs.reconfigure(live)

    def stop(self) -> None:
        """End all servers, once their requests are answered."""
        for server in self._servers:
            server.should_exit = True
        self.thread.join()


@contextmanager
def started(
    settings: Settings,
    timing: IngressTiming = INGRESS_TIMING,
    ingresses: int = 1,
    units: Units = units,
    remote: Any = None,
    *,
    stored: bool = False,
    runners: int = 0,
) -> Iterator[Edge]:
    """Start an edge; it answers until the block ends."""
    edge = Edge(settings, timing, ingresses, units, remote, stored=stored, runners=runners)
    edge.thread.start()
    wait_for(lambda: edge.up or not edge.thread.is_alive())
    assert edge.up
    try:
        yield edge
    finally:
        edge.stop()
