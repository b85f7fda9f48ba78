"""Webhooks to a real server: signed, repeated, given up, and never sent into the own network."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import Connection, select, update

from bench.tenants import add_tenants
from serve.jobs.addresses import ForbiddenAddressError, checked_socket, is_public
from serve.jobs.outbox import enqueue_event
from serve.jobs.webhook_rows import (
    PAUSES_S,
    EndpointChange,
    add_endpoint,
    send_again,
    take_due,
)
from serve.settings.application import JobSettings, Settings, sqlite_url
from serve.store.database import Database
from serve.store.schema import DELIVERIES

from ..stored import store_in
from ..wait import wait_for
from .edge import Edge, started

GENERATE = "/v1/images/generations"
ASYNC = {"prefer": "respond-async"}


class Receiver:
    """A server that keeps what it is sent; `status`: what it answers."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.status = 204
        self.reason: str | None = None
        self.answering = threading.Event()
        self.answering.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                receiver.answering.wait(30)
                self.send_response(receiver.status, receiver.reason)
                self.send_header("location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.answering.set()
        self.server.shutdown()
        self.server.server_close()

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


class Server:
    def __init__(self, edge: Edge, folder: Path, key: str) -> None:
        self.edge, self.database = edge, Database(sqlite_url(folder))
        self.client = httpx.Client(
            base_url=edge.url, headers={"authorization": f"Bearer {key}"}, timeout=30
        )

    def endpoint(self, url: str, *events: str) -> dict[str, Any]:
        body = {"url": url, **({"event_types": list(events)} if events else {})}
        answer = self.client.post("/v1/webhook_endpoints", json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def job(self) -> str:
        id: str = self.client.post(GENERATE, json={"prompt": "x"}, headers=ASYNC).json()["id"]
        return id

    def deliveries(self, endpoint: str) -> list[Any]:
        found = select(DELIVERIES).where(DELIVERIES.c.endpoint == endpoint)
        return self.database.read(lambda c: list(c.execute(found)))

    def delivery(self, endpoint: str) -> Any:
        """The one message to an endpoint; waits until there is one."""
        wait_for(lambda: bool(self.deliveries(endpoint)))
        (found,) = self.deliveries(endpoint)
        return found

    def make_due(self, endpoint: str) -> None:
        """Let messages be due now, however long their pause."""
        of = DELIVERIES.c.endpoint == endpoint
        self.database.write(lambda c: c.execute(update(DELIVERIES).where(of).values(next=0.0)))


@pytest.fixture(scope="module")
def server(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data")
    keys = add_tenants(store_in(folder), {"acme": {}})
    jobs = JobSettings(webhook_networks=(ip_network("127.0.0.0/8"),))
    changes = {"auth": "keys", "data_folder": str(folder), "jobs": jobs}
    with started(laptop.model_copy(update=changes), runners=1) as edge:
        wait_for(lambda: edge.ingress._session.tenants is not None)
        server = Server(edge, folder, keys["acme"])
        yield server
        server.client.close()
        server.database.close()


@pytest.fixture
def receiver(server: Server) -> Iterator[Receiver]:
    found = Receiver()
    yield found
    for one in server.client.get("/v1/webhook_endpoints").json()["data"]:
        server.client.delete(f"/v1/webhook_endpoints/{one['id']}")
    found.close()


def test_openais_client_verifies_what_it_is_sent(server: Server, receiver: Receiver) -> None:
    endpoint = server.endpoint(receiver.url)
    id = server.job()
    wait_for(lambda: len(receiver.got) == 1)
    headers, body = receiver.got[0]
    with openai.OpenAI(api_key="x", webhook_secret=endpoint["signing_secret"]) as client:
        event: Any = client.webhooks.unwrap(body, headers)
        assert (event.type, event.data.id) == ("job.succeeded", id)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + b" ", headers)
    assert headers["webhook-id"] == json.loads(body)["id"]
    wait_for(lambda: server.delivery(endpoint["id"]).state == "delivered")
    listed = server.client.get("/v1/webhook_endpoints").json()["data"]
    assert "signing_secret" not in listed[0]


def test_openais_client_manages_endpoints(server: Server, receiver: Receiver) -> None:
    key = server.client.headers["authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{server.edge.url}/v1", api_key=key, max_retries=0) as client:
        made = client.webhooks.create(
            name="mine", url=receiver.url, event_types=["batch.completed"]
        )
        assert made.signing_secret.startswith("whsec_")
        assert client.webhooks.list().data[0].id == made.id
        changed = client.webhooks.update(made.id, name="other")
        assert (changed.name, changed.event_types) == ("other", ["batch.completed"])
        fresh = client.webhooks.rotate_secret(made.id)
        assert fresh.signing_secret != made.signing_secret
        assert client.webhooks.retrieve(made.id).url == receiver.url
        assert client.webhooks.delete(made.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.webhooks.retrieve(made.id)


def test_only_the_events_that_are_asked_for_are_sent(server: Server, receiver: Receiver) -> None:
    server.endpoint(receiver.url, "job.failed")
    other = server.endpoint(receiver.url + "2")
    server.job()
    body = {"prompt": "deadly"}
    server.client.post(GENERATE, json=body, headers=ASYNC)
    wait_for(lambda: len(receiver.got) == 3)
    wait_for(lambda: all(d.state == "delivered" for d in server.deliveries(other["id"])))
    found = sorted(event["type"] for event in receiver.events())
    assert found == ["job.failed", "job.failed", "job.succeeded"]


def test_a_message_is_sent_again_until_it_is_taken_with_the_same_id(
    server: Server, receiver: Receiver
) -> None:
    receiver.status = 500
    endpoint = server.endpoint(receiver.url)
    server.job()
    wait_for(lambda: server.delivery(endpoint["id"]).answer == "500 Internal Server Error")
    (waiting,) = server.deliveries(endpoint["id"])
    assert (waiting.state, waiting.attempts) == ("waiting", 1)
    receiver.status = 200
    server.make_due(endpoint["id"])
    wait_for(lambda: server.delivery(endpoint["id"]).state == "delivered")
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len(receiver.got) == 2


def has_attempts(server: Server, endpoint: str, attempts: int) -> bool:
    return bool(server.delivery(endpoint).attempts == attempts)


def is_answered(server: Server, endpoint: str) -> bool:
    return bool(server.delivery(endpoint).answer)


def test_a_message_is_dead_after_three_days_and_an_operator_sends_it_again(
    server: Server, receiver: Receiver
) -> None:
    receiver.status = 302  # a redirect is no success, and nothing is sent where it leads
    endpoint = server.endpoint(receiver.url)
    server.job()
    for attempt in range(1, len(PAUSES_S) + 2):
        wait_for(partial(has_attempts, server, endpoint["id"], attempt))
        wait_for(lambda: server.delivery(endpoint["id"]).answer.startswith("302"))
        wait_for(lambda: not any(server.edge.jobs[0]._sender._sending.values()))
        if server.delivery(endpoint["id"]).state == "waiting":
            server.make_due(endpoint["id"])
    wait_for(lambda: server.delivery(endpoint["id"]).state == "dead")
    assert sum(PAUSES_S) > 3 * 86400
    receiver.status = 200
    (dead,) = server.deliveries(endpoint["id"])
    assert server.database.write(lambda c: send_again(c, dead.id, 0.0))
    wait_for(lambda: server.delivery(endpoint["id"]).state == "delivered")
    assert not server.database.write(lambda c: send_again(c, dead.id, 0.0))


def test_an_answer_that_is_no_text_is_an_answer(server: Server, receiver: Receiver) -> None:
    receiver.status, receiver.reason = 500, "O\xffK\x01"
    endpoint = server.endpoint(receiver.url)
    server.job()
    wait_for(lambda: server.delivery(endpoint["id"]).answer.startswith("500 O?K"))
    receiver.status = 200
    server.make_due(endpoint["id"])
    wait_for(lambda: server.delivery(endpoint["id"]).state == "delivered")


def test_many_endpoints_of_one_tenant_do_not_delay_those_of_another(tmp_path: Path) -> None:
    with closing(Database(sqlite_url(tmp_path))) as database:

        def prepare(connection: Connection) -> None:
            for tenant, endpoints in (("many", 20), ("one", 1)):
                for _ in range(endpoints):
                    given = EndpointChange("", "https://x.example", "")
                    add_endpoint(connection, tenant, given, 0.0)
                for number in range(10):
                    enqueue_event(connection, tenant, "job.succeeded", f"job_{number}", 0.0)

        database.write(prepare)
        taken = database.write(lambda c: take_due(c, {}, (), 64, 60.0, 1.0))
        by_tenant = Counter(message.endpoint.tenant for message in taken)
        assert by_tenant == {"many": 8, "one": 4}
        sending = Counter(message.endpoint for message in taken)
        assert database.write(lambda c: take_due(c, sending, (), 64, 60.0, 1.0)) == []


def test_an_endpoint_that_is_gone_is_disabled(server: Server, receiver: Receiver) -> None:
    receiver.status = 410
    endpoint = server.endpoint(receiver.url)
    server.job()
    path = f"/v1/webhook_endpoints/{endpoint['id']}"
    wait_for(lambda: server.client.get(path).json()["disabled"])
    before = len(receiver.got)
    id = server.job()
    wait_for(lambda: server.client.get(f"/v1/jobs/{id}").json()["completed_at"])
    assert {d.state for d in server.deliveries(endpoint["id"])} == {"dead"}
    assert len(receiver.got) == before
    receiver.status = 200
    assert server.client.post(path, json={}).json()["disabled"] is None  # enabled again
    server.job()
    wait_for(lambda: len(receiver.got) == before + 1)


def test_a_receiver_that_never_answers_delays_neither_images_nor_other_receivers(
    server: Server, receiver: Receiver
) -> None:
    receiver.answering.clear()
    server.endpoint(receiver.url)
    other = Receiver()
    server.endpoint(other.url)
    ids = [server.job() for _ in range(20)]
    wait_for(lambda: len(other.got) == len(ids))
    wait_for(lambda: len(receiver.got) == 4)  # at a time
    assert {event["data"]["id"] for event in other.events()} == set(ids)
    other.close()
    receiver.answering.set()
    wait_for(lambda: len(receiver.got) == len(ids))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"url": "ftp://example.com"}, "must be https://HOST/… or http://HOST/…"),
        ({"url": "https://user:secret@example.com"}, "without a user name"),
        ({"url": "https://"}, "must be https"),
        ({"url": "https://exa mple.com"}, "must be https"),
        ({"url": "https://[::1"}, "must be https"),
        ({"url": "https://x.example", "event_types": ["job.suceeded"]}, "did you mean"),
        ({}, "url is required"),
    ],
)
def test_a_wrong_endpoint_is_refused(server: Server, body: dict[str, Any], expected: str) -> None:
    answer = server.client.post("/v1/webhook_endpoints", json=body)
    assert answer.status_code == 400
    assert expected in answer.json()["error"]["message"]


PRIVATE = (
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),  # noqa: S104
    *("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "ff02::1"),
    *("fec0::1", "::ffff:0:7f00:1", "5f00::1", "fe00::1"),
    *("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1", "2001:0:1::1"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_no_public_ones(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.fixture
def connect() -> Callable[..., None]:
    def make(address: str, *networks: str, private_only: bool = False) -> None:
        maker = checked_socket(lambda: [ip_network(n) for n in networks], private_only=private_only)
        family = 10 if ":" in address else 2
        maker((family, 1, 6, "", (address, 443))).close()

    return make


def test_a_socket_is_made_for_allowed_addresses_only(connect: Callable[..., None]) -> None:
    connect("93.184.216.34")
    connect("10.1.2.3", "10.0.0.0/8")
    connect("10.1.2.3", "10.0.0.0/8", private_only=True)
    for address, networks, private_only in (
        ("10.1.2.3", (), False),
        ("11.1.2.3", ("10.0.0.0/8",), True),  # without TLS only private networks
        ("::ffff:10.1.2.3", (), False),
        ("fe80::1%eth0", (), False),
    ):
        with pytest.raises(ForbiddenAddressError):
            connect(address, *networks, private_only=private_only)


def test_nothing_is_sent_to_a_private_address_whatever_its_name(
    server: Server, receiver: Receiver
) -> None:
    """The name `localhost` is looked up when the socket is made, and so is a literal address."""
    settings = server.edge.settings
    jobs = settings.jobs.model_copy(update={"webhook_networks": (ip_network("10.0.0.0/8"),)})
    server.edge.tune(settings.model_copy(update={"jobs": jobs}))
    try:
        port = receiver.server.server_port
        urls = f"http://localhost:{port}", f"http://127.0.0.1:{port}", f"http://[::1]:{port}"
        made = [server.endpoint(url)["id"] for url in urls]
        server.job()
        for endpoint in made:
            wait_for(partial(is_answered, server, endpoint))
            assert "webhooks may not be sent to" in server.delivery(endpoint).answer
        assert receiver.got == []
    finally:
        server.edge.tune(settings)
