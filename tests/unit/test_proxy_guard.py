"""The guard in Serve's proxy while the proxy's node drains; test_edge has its other tests."""

import asyncio
import http.client
import socket
import threading
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from serve.api.proxy_guard import ProxyGuard

from ..ports import free_port
from ..wait import wait_for


class Proxy:
    """A stand-in for Serve's proxy; `look_s`: seconds between two checks of its health."""

    def __init__(self, look_s: float, accept_s: float = 60.0) -> None:
        self.health, self.checks, self.asked = 200, 0, 0
        self.said = "success"  # the body of Serve's answer
        routes = [
            Route("/-/healthz", self._health),
            Route("/v1/models", self._models),
            Route("/ready", self._ready),
            Route("/own", lambda _: JSONResponse({"own": True}, 404)),
        ]
        self.app = ProxyGuard(Starlette(routes=routes), look_s, accept_s)
        self.client = TestClient(self.app)

    def _health(self, request: Request) -> Response:
        self.checks += 1
        assert not request.headers
        return PlainTextResponse(self.said, self.health)

    async def _ready(self, _: Request) -> Response:
        self.asked += 1
        return PlainTextResponse(f"asked {self.asked}", 503)

    async def _models(self, request: Request) -> Response:
        await asyncio.sleep(0)
        return PlainTextResponse(request.headers["accept"])

    def connection(self) -> str | None:
        answer = self.client.get("/v1/models?x=1", headers={"accept": "y"})
        assert (answer.status_code, answer.text) == (200, "y")
        return answer.headers.get("connection")


def test_answers_close_connections_when_the_node_leaves() -> None:
    proxy = Proxy(look_s=0.0)
    assert proxy.connection() is None
    proxy.health = 503
    assert proxy.connection() == "close"
    assert proxy.client.get("/-/routes").headers["connection"] == "close"
    proxy.health = 200  # the drain was called off
    assert proxy.connection() is None


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_leaving_proxy_serves_its_connections_and_accepts_no_others(loop: Any) -> None:
    proxy, port = Proxy(look_s=0.0, accept_s=0.0), free_port()
    server = uvicorn.Server(uvicorn.Config(proxy.app, port=port, loop=loop, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    kept = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(3)]

    def answer(connection: http.client.HTTPConnection) -> tuple[int, str | None]:
        connection.request("GET", "/v1/models", headers={"accept": "y"})
        found = connection.getresponse()
        found.read()
        return found.status, found.headers.get("connection")

    try:
        assert [answer(connection) for connection in kept] == [(200, None)] * 3
        proxy.health, proxy.said = 503, "No replicas are available yet."
        assert answer(kept[2]) == (200, "close")
        socket.create_connection(("127.0.0.1", port)).close()  # it still accepts
        proxy.said = "This node is being drained."
        assert answer(kept[0]) == (200, "close")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert answer(kept[1]) == (200, "close")
    finally:
        server.should_exit = True
        thread.join()


def test_health_is_checked_at_intervals() -> None:
    proxy = Proxy(look_s=60.0)
    for _ in range(5):
        proxy.connection()
    assert proxy.checks == 1


def test_many_probes_ask_an_ingress_once() -> None:
    proxy = Proxy(look_s=60.0)
    answers = [proxy.client.get("/ready", headers={"x-request-id": f"id{i}"}) for i in range(5)]
    assert {(answer.status_code, answer.text) for answer in answers} == {(503, "asked 1")}
    assert [answer.headers.get("age") for answer in answers] == [None, *["0"] * 4]
    assert answers[-1].headers["x-request-id"] == "id4"
    assert proxy.asked == 1
    proxy = Proxy(look_s=0.0)
    assert [proxy.client.get("/ready").text for _ in range(2)] == ["asked 1", "asked 2"]


def test_a_proxy_without_routes_asks_clients_to_try_again() -> None:
    proxy = Proxy(look_s=60.0)
    answer = proxy.client.post("/unrouted")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["connection"] == "close"
    own = proxy.client.get("/own")
    assert (own.status_code, own.json()) == (404, {"own": True})


def test_an_answer_that_broke_off_is_not_used_again() -> None:
    """The first client disconnects, so Serve's proxy sends it nothing."""
    sent: list[str] = []

    async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ready" and not sent:
            sent.append("nothing")
            return
        await PlainTextResponse("whole")(scope, receive, send)

    guard = ProxyGuard(breaks_off, look_s=60.0)
    client = TestClient(guard, raise_server_exceptions=False)
    client.get("/ready")
    assert client.get("/ready").text == "whole"
    assert client.get("/ready").headers["age"] == "0"
