"""The guard against clients that go on sending although they were told to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.api.flood_guard import FLOOD, FloodGuard, FloodTiming

ACME = "Bearer octet_acme_" + "0" * 40
PATH = "/v1/images/generations"
TIMING = FloodTiming(pause_s=0.0, report_s=0.0)


class Proxy:
    """A server behind the guard that refuses everybody while `refuses`.

    `now`: its clock. `takes_s`: how long it takes to decide.
    """

    def __init__(self, status: int = 429, wait_ms: int | None = 5000) -> None:
        self.refuses, self.asked, self.now, self.takes_s = True, 0, 0.0, 0.0
        self.status, self.wait_ms = status, wait_ms
        routes = [Route(PATH, self._answer, methods=["POST"]), Route("/other", self._answer)]
        self.guard = FloodGuard(Starlette(routes=routes), TIMING, lambda: self.now)

    async def _answer(self, request: Request) -> Response:
        self.asked += 1
        self.now += self.takes_s
        if not self.refuses:
            return JSONResponse({})
        headers = {"x-request-id": request.headers.get("x-request-id", "none")}
        if self.wait_ms is not None:
            headers["retry-after-ms"] = str(self.wait_ms)
        return JSONResponse({"error": {"code": "queue_full"}}, self.status, headers)

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

        return asyncio.run(main())


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
    assert [answer.status_code for answer in proxy.post(4)] == [200] * 4


def test_few_requests_pass_before_the_first_of_them_is_answered() -> None:
    proxy = Proxy()
    proxy.post(FLOOD + 20)
    proxy.now += TIMING.hold_s + 0.01
    proxy.refuses = False
    passed = []
    for _ in range(9):
        passed.append([answer.status_code for answer in proxy.post(1500)].count(200))
        proxy.now += TIMING.window_s
    assert passed == [4, 8, 16, 32, 64, 128, 256, 512, 1500]


def test_a_server_that_decides_slowly_is_asked_less() -> None:
    proxy = Proxy()
    proxy.post(FLOOD + 20)
    proxy.now += TIMING.hold_s + 0.01
    proxy.takes_s = 0.3
    proxy.post(1)
    proxy.takes_s, proxy.refuses = 0.0, False
    assert proxy.post(1)[0].status_code == 429
    proxy.now += 2 * 0.3 - 0.01
    assert proxy.post(1)[0].status_code == 429
    proxy.now += 0.02
    assert [answer.status_code for answer in proxy.post(9)].count(200) == 4
    proxy.now += 2 * 0.3 - 0.02
    assert proxy.post(1)[0].status_code == 429
    proxy.now += 0.03
    assert [answer.status_code for answer in proxy.post(9)].count(200) == 8


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
