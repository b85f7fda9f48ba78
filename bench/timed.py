"""The application with Generators that only wait, to measure dispatch without a model.

`build` puts the classes and the function below in the place of the Generator, the TextEncoder, the
Ingress and the reference work. An image then takes `STEP_S` per step, however many images
run at the same time. `fifo` is the same service on plain Ray Serve: one deployment, whose handle's
queue is first come, first served. `bare` makes the same hops as Octet, on plain Ray Serve too.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import resource
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.cost import CostCoefficients
from serve.api.ingress import Ingress
from serve.app import Parts, application
from serve.dispatch.client.session import DispatchSession
from serve.dispatch.protocol import Heartbeat, Lease, QueuedImage, StoppedImage
from serve.engine.exclusive import SharedExclusiveLock
from serve.errors import OctetError
from serve.request import Acknowledgement, ImageRequest, ImageResult, StreamOptions, Timings
from serve.settings.application import CatalogueSettings
from serve.settings.serve_config import PoolArguments
from serve.usage.record import UsageRecord

from .step_time import STEP_S

FILE = bytes(2000)  # stands for an image file; its content is never read


class TimedGenerator:
    """Stands for `Generator`: takes the same calls and waits `STEP_S` × steps for each image.

    It reports itself to the Dispatcher with the same heartbeats.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self, arguments: dict[str, Any], text_encoder: Any, dispatcher: Any
    ) -> None:
        """The arguments of `Generator`."""
        given = PoolArguments.model_validate(arguments)
        self._slots, self._precision = given.pool.slots, given.pool.precision
        self._pool, self._dispatcher = given.name, dispatcher
        self._running: set[Lease] = set()
        self._stopped: list[StoppedImage] = []
        self._lock = SharedExclusiveLock()
        self._replica = ray_serve.get_replica_context().replica_id.unique_id
        self._heartbeat = asyncio.create_task(self._report())

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ignore the reference pool: the unit of work is `STEP_S`."""

    async def generate(
        self, request: ImageRequest, lease: Lease, options: StreamOptions, alone: bool
    ) -> AsyncIterator[Acknowledgement | ImageResult]:
        if lease.replica != self._replica:
            yield Acknowledgement.REFUSED
            return
        yield Acknowledgement.RECEIVED
        began, done = None, False
        self._running.add(lease)
        try:
            async with self._lock.held(exclusively=alone):
                began = time.monotonic()
                yield Acknowledgement.STARTED
                await asyncio.sleep(STEP_S * request.num_inference_steps)
                done = True
        finally:
            self._running.discard(lease)
            if not done:
                steps = int((time.monotonic() - began) / STEP_S) if began else 0
                self._stopped.append(StoppedImage(lease, steps, steps * STEP_S))
        yield ImageResult(
            image=FILE,
            seed=request.seed,
            precision=self._precision,
            emulated=False,
            text_tokens=0,
            work_s=STEP_S * request.num_inference_steps,
            timings=Timings(text_s=0, denoise_s=0, decode_s=0, encode_s=0),
        )

    async def check_health(self) -> None:
        if self._heartbeat.done():
            raise RuntimeError("no heartbeat")

    async def _report(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        while True:
            heartbeat = Heartbeat(
                self._pool, self._replica, self._slots, 0.0, float(self._slots), node, 2.0
            )
            stopped, self._stopped = self._stopped, []
            try:
                await self._dispatcher.report_replica.remote(
                    heartbeat, list(self._running), stopped
                )
            except Exception:  # any error: the next heartbeat tries again
                logging.getLogger("ray.serve").warning("no dispatcher", exc_info=True)
            await asyncio.sleep(1)


class TimedTextEncoder:
    """Stands for `TextEncoder`; nothing calls it."""

    def __init__(self, *_: Any) -> None:
        pass

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        pass


class TimedIngress(Ingress):
    """An Ingress whose refusals say in a header how long the handler took."""

    async def generate(self, http: Request) -> Response:
        began = time.perf_counter()
        try:
            return await super().generate(http)
        except OctetError as error:
            took_ms = 1000 * (time.perf_counter() - began)
            error.headers["server-timing"] = f"handler;dur={took_ms:.3f}"
            raise


def units(settings: CatalogueSettings) -> Mapping[str, CostCoefficients]:
    """The reference work of each model: `STEP_S` per step, and nothing else."""
    return {model.id: CostCoefficients(0, STEP_S, 0, 0, 0) for model in settings.models}


def build(args: dict[str, Any]) -> Any:
    """Build an application of `serve.app` with the stand-ins of this file."""
    return application(args, Parts(TimedGenerator, TimedTextEncoder, TimedIngress, units))


# -- plain Ray Serve ------------------------------------------------------------------------------


class FifoGenerator:
    """Waits as long as an image of `steps` takes, then returns its file."""

    async def generate(self, steps: int) -> bytes:
        await asyncio.sleep(STEP_S * steps)
        return FILE


class FifoIngress:
    """Takes HTTP requests and hands each to the generator's handle, which queues them."""

    def __init__(self, generator: DeploymentHandle) -> None:
        self._generator = generator

    async def __call__(self, http: Request) -> Response:
        asked = await http.json()
        image = await self._generator.generate.remote(asked["num_inference_steps"])
        return JSONResponse({"bytes": len(image)})


def fifo(slots: int) -> Any:
    """Plain Ray Serve with one replica of `slots` slots, first come, first served."""
    generator = ray_serve.deployment(FifoGenerator).options(
        max_ongoing_requests=slots,
        request_router_config=RequestRouterConfig(initial_backoff_s=0.005, max_backoff_s=0.02),
        ray_actor_options={"num_cpus": 0.1},
    )
    ingress = ray_serve.deployment(FifoIngress).options(
        max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.1}
    )
    return ingress.bind(generator.bind())


class BareDispatcher:
    """Answers each call at once."""

    async def admit(self, steps: int) -> int:
        return steps


class BareIngress:
    """Calls the Dispatcher and then the Generator, through handles."""

    def __init__(self, dispatcher: DeploymentHandle, generator: DeploymentHandle) -> None:
        self._dispatcher, self._generator = dispatcher, generator

    def __serve_build_asgi_app__(self) -> Starlette:
        return Starlette(routes=[Route("/", self.generate, methods=["POST"])])

    async def generate(self, http: Request) -> Response:
        asked = await http.json()
        steps = await self._dispatcher.admit.remote(asked["num_inference_steps"])
        image = await self._generator.generate.remote(steps)
        return JSONResponse({"b64_json": base64.b64encode(image).decode()})


def bare() -> Any:
    """Plain Ray Serve with the same two hops as a generated image, and nothing else."""
    few = {"num_cpus": 0.1}
    dispatcher = ray_serve.deployment(BareDispatcher).options(
        max_ongoing_requests=10_000, ray_actor_options=few
    )
    generator = ray_serve.deployment(FifoGenerator).options(
        max_ongoing_requests=10_000, ray_actor_options=few
    )
    ingress = ray_serve.deployment(ray_serve.ingress()(BareIngress)).options(
        max_ongoing_requests=10_000, ray_actor_options=few
    )
    return ingress.bind(dispatcher.bind(), generator.bind())


# -- the Dispatcher alone -------------------------------------------------------------------------


class Client:
    """A client that never ends its call."""

    unwanted = False

    def cancel(self) -> None:
        pass


class Driver:
    """A deployment that makes calls through one session, without HTTP and without images."""

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher
        self._session: DispatchSession | None = None

    async def drive(self, opened: int, seconds: float, pool: str, tenants: list[str]) -> Any:
        """Keep `opened` calls open for `seconds`.

        Returns the seconds that each call waited for its grant (`waits`, sorted), the seconds that
        the run took, and the CPU seconds that this process used.
        """
        self._session = session = self._session or DispatchSession(self._dispatcher)
        waits: list[float] = []
        until = time.monotonic() + seconds

        async def beat() -> None:
            while True:
                heartbeat = Heartbeat(pool, "driver", opened, speed=1e6)
                await self._dispatcher.report_replica.remote(heartbeat)
                await asyncio.sleep(1)

        async def keep_calling(worker: int) -> None:
            tenant, number = tenants[worker % len(tenants)], 0
            while time.monotonic() < until:
                number += 1
                began, id = time.monotonic(), f"{worker}-{number}-{seconds}"
                call = session.open(tenant, id, [QueuedImage((pool,), 0.001)], 60, Client())
                await call.admitted()
                async with call.slot(0) as slot:
                    waits.append(time.monotonic() - began)
                    slot.took_s = 0.001
                call_id = call.request.call_id
                await call.record(
                    [UsageRecord(call_id, 0, tenant, id, "m", "fp16", "64x64", 1, 0.001)]
                )
                call.close()

        beating = asyncio.create_task(beat())
        await asyncio.sleep(0.5)
        cpu, began = _cpu_s(), time.monotonic()
        await asyncio.gather(*(keep_calling(worker) for worker in range(opened)))
        took_s = time.monotonic() - began
        beating.cancel()
        return {"waits": sorted(waits), "took_s": took_s, "cpu_s": _cpu_s() - cpu}


def _cpu_s() -> float:
    """CPU seconds that this process has used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
