"""The guard against clients that go on sending although they were told to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.api.flood_guard import (
    BATCH,
    FLOOD,
    LIGHT_S,
    MOST_SENT,
    FloodGuard,
    FloodTiming,
)

from ..wait import PATIENCE_S

ACME = "Bearer octet_acme_" + "0" * 40
PATH = "/v1/images/generations"
TIMING = FloodTiming(pause_s=0.0, report_s=0.0)


RUNNERS = ExitStack()  # the event loops of all proxies


@pytest.fixture(autouse=True)
def closed_loops() -> Iterator[None]:
    with RUNNERS:
        yield


class Proxy:
    """A server behind the guard that refuses everybody while `refuses`.

    `now`: its clock. `busy`: while it is not set, nothing is answered but `other` clients.
    """

    def __init__(self, status: int = 429, wait_ms: int | None = 5000) -> None:
        self.refuses, self.asked, self.now = True, 0, 0.0
        self.probed, self.busy = asyncio.Event(), asyncio.Event()
        self.busy.set()
        self.run = RUNNERS.enter_context(asyncio.Runner()).run
        self.status, self.wait_ms = status, wait_ms
        routes = [
            Route(PATH, self._answer, methods=["POST"]),
            Route("/other", self._answer),
            Route("/health", self._health),
        ]
        self.guard = FloodGuard(Starlette(routes=routes), TIMING, lambda: self.now)

    async def _answer(self, request: Request) -> Response:
        self.asked += 1
        if "other" not in request.headers["authorization"]:
            await self.busy.wait()
        if not self.refuses:
            return JSONResponse({})
        headers = {"x-request-id": request.headers.get("x-request-id", "none")}
        if self.wait_ms is not None:
            headers["retry-after-ms"] = str(self.wait_ms)
        return JSONResponse({"error": {"code": "queue_full"}}, self.status, headers)

    async def _health(self, _: Request) -> Response:
        self.probed.set()
        await self.busy.wait()
        return JSONResponse({})

    def post(
        self, times: int, key: str = ACME, path: str = PATH, body: bytes = b"{}"
    ) -> Sequence[httpx.Response]:
        async def main() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.guard)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                headers = {"authorization": key, "x-request-id": "mine"}
                return [
                    await client.post(path, headers=headers, content=body) for _ in range(times)
                ]

        return self.run(main())


@pytest.mark.parametrize("status", [429, 503])
def test_a_client_that_does_not_wait_is_refused_without_being_asked(status: int) -> None:
    proxy = Proxy(status)
    answers = proxy.post(FLOOD + 20)
    assert proxy.asked == FLOOD + 1
    assert {answer.status_code for answer in answers} == {status}
    last = answers[-1]
    assert last.json() == {"error": {"code": "queue_full"}}
    assert last.headers["x-request-id"] == "mine"
    assert last.headers["content-length"] == str(len(last.content))
    assert 4900 < int(last.headers["retry-after-ms"]) <= 5001
    assert last.headers["retry-after"] == "5"


def test_it_is_asked_again_after_a_short_time() -> None:
    proxy = Proxy()
    proxy.post(FLOOD + 20)
    proxy.now += TIMING.hold_s - 0.01
    proxy.post(5)
    assert proxy.asked == FLOOD + 1
    proxy.now += 0.02
    proxy.post(5)  # the first one is refused by the server, and the others by the guard
    assert proxy.asked == FLOOD + 2
    proxy.now += TIMING.hold_s + 0.01
    proxy.refuses = False
    assert [answer.status_code for answer in proxy.post(5)] == [200] * 5


def test_a_sudden_flood_is_sent_on_in_batches() -> None:
    """Until the server has answered anything, it has at most one batch of a client."""
    proxy = Proxy()

    async def main() -> None:
        transport = httpx.ASGITransport(proxy.guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:

            async def post(key: str) -> int:
                return (await client.post(PATH, headers={"authorization": key})).status_code

            proxy.refuses = False
            proxy.busy.clear()
            flood = [asyncio.create_task(post(ACME)) for _ in range(3 * BATCH)]
            await asyncio.wait_for(proxy.probed.wait(), PATIENCE_S)
            assert proxy.asked == BATCH
            assert await post(ACME.replace("acme", "other")) == 200  # others do not wait
            proxy.busy.set()
            assert await asyncio.gather(*flood) == [200] * 3 * BATCH

    proxy.run(main())


def test_answers_let_requests_go_on_without_a_probe() -> None:
    """A client whose requests are answered quickly is not slowed down, and causes no probes."""
    proxy = Proxy()
    proxy.refuses = False
    for _ in range(10 * BATCH):
        proxy.post(1)
    assert not proxy.probed.is_set()


def test_the_batch_grows_with_answers_and_shrinks_with_a_refusal() -> None:
    proxy = Proxy()

    async def sent_at_a_time() -> int:
        """Post many requests to a busy server; return how many reach it before any answer."""
        transport = httpx.ASGITransport(proxy.guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            before = proxy.asked
            proxy.busy.clear()
            proxy.probed.clear()
            headers = {"authorization": ACME}
            posts = [
                asyncio.create_task(client.post(PATH, headers=headers))
                for _ in range(2 * MOST_SENT)
            ]
            await asyncio.wait_for(proxy.probed.wait(), PATIENCE_S)
            sent = proxy.asked - before
            proxy.busy.set()
            await asyncio.gather(*posts)
            return sent

    proxy.refuses = False
    proxy.post(MOST_SENT)
    assert proxy.run(sent_at_a_time()) == MOST_SENT
    proxy.refuses = True
    proxy.post(1)
    proxy.refuses = False
    assert proxy.run(sent_at_a_time()) == BATCH


def test_requests_that_wait_are_refused_when_a_refusal_comes() -> None:
    proxy = Proxy()

    async def main() -> None:
        transport = httpx.ASGITransport(proxy.guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            headers = {"authorization": ACME}
            flood = [client.post(PATH, headers=headers) for _ in range(20 * BATCH)]
            answers = await asyncio.gather(*flood)
        assert {answer.status_code for answer in answers} == {429}
        assert proxy.asked <= FLOOD + 2 * BATCH

    proxy.run(main())


def test_a_slow_client_causes_no_probes() -> None:
    proxy = Proxy()
    proxy.refuses = False
    for _ in range(3 * BATCH):
        proxy.post(1)
        proxy.now += LIGHT_S + 0.01
    assert not proxy.probed.is_set()


def test_a_named_time_that_is_shorter_is_kept() -> None:
    proxy = Proxy(wait_ms=100)
    proxy.post(FLOOD + 20)
    proxy.now += 0.11
    proxy.refuses = False
    assert proxy.post(1)[0].status_code == 200


def test_others_are_not_refused() -> None:
    proxy = Proxy()
    proxy.post(FLOOD + 5)
    asked = proxy.asked
    proxy.refuses = False
    assert proxy.post(1, key=ACME.replace("acme", "other"))[0].status_code == 200
    assert proxy.post(1, path="/other")[0].status_code == 405
    assert proxy.asked == asked + 1


def test_a_client_that_is_refused_now_and_then_is_always_asked() -> None:
    proxy = Proxy()
    for _ in range(50):
        proxy.post(1)
        proxy.now += 1.5 / FLOOD
    assert proxy.asked == 50


@pytest.mark.parametrize(("status", "wait_ms"), [(503, None), (400, 5000), (200, 5000)])
def test_answers_that_name_no_time_or_are_no_refusals_hold_nobody(
    status: int, wait_ms: int | None
) -> None:
    proxy = Proxy(status, wait_ms)
    proxy.post(FLOOD + 20)
    assert proxy.asked == FLOOD + 20


def test_refusals_are_logged_together(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ray.serve"):
        proxy = Proxy()
        proxy.post(FLOOD + 21)
    counts = [record.__dict__["count"] for record in caplog.records]
    assert sum(counts) == 20
    assert {record.__dict__["tenant"] for record in caplog.records} == {"acme"}
    assert ACME[-40:] not in caplog.text
