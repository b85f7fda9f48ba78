"""The application with Generators that only wait, so that what is measured is who waits for whom.

An image takes `STEP_S` a step, whatever else is drawn. `fifo` is the same service on plain Ray
Serve: one deployment, whose handle's queue is first come, first served.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.cost import CostCoefficients
from serve.api.ingress import Ingress
from serve.dispatch.client.open_call import Wish
from serve.dispatch.client.session import DispatchSession
from serve.dispatch.protocol import Heartbeat, Lease, StoppedImage
from serve.errors import OctetError
from serve.request import Acknowledgement, ImageRequest, ImageResult, StreamOptions, Timings
from serve.settings.application import ApplicationSettings
from serve.settings.models import Pool, ServedModel
from serve.usage.record import UsageRecord

from .load import STEP_S

FILE = bytes(2000)  # in the place of a picture, at which nobody looks


class TimedGenerator:
    """Takes what `Generator` takes; an image is `STEP_S` × its steps of waiting."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self, model: dict[str, Any], pool: dict[str, Any], *others: Any
    ) -> None:
        settings = Pool.model_validate(pool)
        self._slots, self._precision = settings.slots, settings.precision
        self._pool = ServedModel.model_validate(model).pool_name(settings)
        self._dispatcher = others[-1]
        self._drawing: set[Lease] = set()
        self._stopped: list[StoppedImage] = []
        self._leaving = False
        self._heartbeat = asyncio.create_task(self._report())

    async def generate(
        self, request: ImageRequest, lease: Lease, watch: StreamOptions, alone: bool
    ) -> AsyncIterator[Acknowledgement | ImageResult]:
        yield Acknowledgement.RECEIVED
        began, done = time.monotonic(), False
        self._drawing.add(lease)
        try:
            yield Acknowledgement.STARTED
            await asyncio.sleep(STEP_S * request.num_inference_steps)
            done = True
        finally:
            self._drawing.discard(lease)
            if not done:
                steps = int((time.monotonic() - began) / STEP_S)
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

    def record_routing_stats(self) -> dict[str, bool]:
        return {"leaving": self._leaving}

    async def _report(self) -> None:
        name = ray_serve.get_replica_context().replica_id.unique_id
        node = ray.get_runtime_context().get_node_id()
        while True:
            said = Heartbeat(self._pool, name, self._slots, 0.0, float(self._slots), node, 2.0)
            stopped, self._stopped = self._stopped, []
            try:
                reply = await self._dispatcher.report_replica.remote(
                    said, list(self._drawing), stopped
                )
                self._leaving = reply.leaving
            except Exception:  # whatever it is, the next heartbeat comes
                logging.getLogger("ray.serve").warning("no dispatcher", exc_info=True)
            await asyncio.sleep(1)


class TimedTextEncoder:
    def __init__(self, *_: Any) -> None:
        pass


class TimedIngress(Ingress):
    """Says in a header of refusals how long its handler took."""

    async def generate(self, http: Request) -> Response:
        began = time.perf_counter()
        try:
            return await super().generate(http)
        except OctetError as error:
            took_ms = 1000 * (time.perf_counter() - began)
            error.headers["server-timing"] = f"handler;dur={took_ms:.3f}"
            raise


def units(application: ApplicationSettings) -> Mapping[str, CostCoefficients]:
    return {model.id: CostCoefficients(0, STEP_S, 0, 0, 0) for model in application.models}


def build(args: dict[str, Any]) -> Any:
    import serve.app  # and torch with it, for which replicas that only wait have no use

    for name, stands_in in (
        ("Generator", TimedGenerator),
        ("TextEncoder", TimedTextEncoder),
        ("Ingress", TimedIngress),
        ("units", units),
    ):
        setattr(serve.app, name, stands_in)
    return serve.app.build(args)


# -- plain Ray Serve ------------------------------------------------------------------------------


class FifoGenerator:
    async def generate(self, steps: int) -> bytes:
        await asyncio.sleep(STEP_S * steps)
        return FILE


class FifoIngress:
    def __init__(self, generator: DeploymentHandle) -> None:
        self._generator = generator

    async def __call__(self, http: Request) -> Response:
        asked = await http.json()
        image = await self._generator.generate.remote(asked["num_inference_steps"])
        return JSONResponse({"bytes": len(image)})


def fifo(slots: int) -> Any:
    generator = ray_serve.deployment(FifoGenerator).options(
        max_ongoing_requests=slots,
        request_router_config=RequestRouterConfig(initial_backoff_s=0.005, max_backoff_s=0.02),
        ray_actor_options={"num_cpus": 0.1},
    )
    ingress = ray_serve.deployment(FifoIngress).options(
        max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.1}
    )
    return ingress.bind(generator.bind())


# -- the Dispatcher alone -------------------------------------------------------------------------


class Client:
    unwanted = False

    def cancel(self) -> None:
        pass


class Driver:
    """Calls without HTTP and without drawing, as many open as asked, by one session."""

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher
        self._session: DispatchSession | None = None

    async def drive(self, opened: int, seconds: float, pool: str, tenants: list[str]) -> Any:
        """How long each call waited for its grant, s; calls in all; this process's CPU seconds."""
        self._session = session = self._session or DispatchSession(self._dispatcher)
        waits: list[float] = []
        until = time.monotonic() + seconds

        async def beat() -> None:
            while True:
                said = Heartbeat(pool, "driver", opened, speed=1e6)
                await self._dispatcher.report_replica.remote(said)
                await asyncio.sleep(1)

        async def call(worker: int) -> None:
            tenant, number = tenants[worker % len(tenants)], 0
            while time.monotonic() < until:
                number += 1
                began, id = time.monotonic(), f"{worker}-{number}-{seconds}"
                wishes = [Wish((pool,), 0.001)]
                opened = session.open(tenant, id, wishes, 60, Client())
                await opened.admitted()
                async with opened.slot(0) as slot:
                    waits.append(time.monotonic() - began)
                    slot.took_s = 0.001
                name = opened.opening.call
                await opened.record(
                    [UsageRecord(name, 0, tenant, id, "m", "fp16", "64x64", 1, 0.001)]
                )
                opened.close()

        beating = asyncio.create_task(beat())
        await asyncio.sleep(0.5)
        cpu, began = _cpu_s(), time.monotonic()
        await asyncio.gather(*(call(worker) for worker in range(opened)))
        took_s = time.monotonic() - began
        beating.cancel()
        return {"waits": sorted(waits), "took_s": took_s, "cpu_s": _cpu_s() - cpu}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
